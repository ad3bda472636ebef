"""Gain on a book's later text against change elsewhere: the frontier of Locas and TempLoRA.

    python recipes/forgetting.py dev ../shared/data/books/dev                                # choose from these
    python recipes/forgetting.py test ../shared/data/books/test --mmlu ../shared/data/mmlu   # what is reported
    python recipes/forgetting.py table results/forgetting_test.json

Both write results/forgetting_SPLIT.json and a picture beside it. Every other book (by name) is learnt, the ones between
are unrelated text; --books and --unrelated choose others. A stopped run goes on from its folder (--work); --join adds
methods or books to results that are there, which must have been measured alike: sizes, windows, texts, MMLU's
questions. With the built-in backbone on one CPU core a run takes about two hours, and all of MMLU about twenty minutes
each time it is asked (once, and once for each method, rank and book): --mmlu-limit 20 makes that two.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from markdown_table import markdown

from locas.cli.common import BackboneOptions, TextOptions
from locas.cli.eval_forgetting import EvalForgetting
from locas.evaluate.cells import finite
from locas.evaluate.forgetting_figures import draw, joined
from locas.store import write_atomically

ROOT = Path(__file__).parents[1]
METHODS = "locas,templora-tuned"


def main() -> int:
    """Runs one split, or prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dev", "test", "table"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--books", help="names without .txt, separated by commas")
    parser.add_argument("--unrelated", help="likewise")
    parser.add_argument("--most", type=int, default=3, help="how many books to learn, and how many unrelated texts")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--lr-factors", default="0.25,0.5,1,2")
    parser.add_argument("--scales", default="0.25,0.5,0.75,1")
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--later-tokens", type=int, default=8192)
    parser.add_argument("--unrelated-tokens", type=int, default=4096)
    parser.add_argument("--mmlu")
    parser.add_argument("--mmlu-limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "forgetting")
    parser.add_argument("--join", type=Path, help="earlier results, which are kept")
    parser.add_argument("--output", type=Path, help="default: results/forgetting_SPLIT.json")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.what == "table":
        print(table(json.loads(args.path.read_text())))
        return 0
    books, unrelated = choose(args.path, args.books, args.unrelated, args.most)
    folder = args.work / args.what
    command = EvalForgetting(
        text=TextOptions(paths=tuple(books), gutenberg=True, reflow=True, max_tokens=args.max_tokens),
        output=str(folder),
        unrelated=tuple(unrelated),
        methods=args.methods,
        ranks=args.ranks,
        lr_factors=args.lr_factors,
        scales=args.scales,
        later_tokens=args.later_tokens,
        unrelated_tokens=args.unrelated_tokens,
        mmlu=args.mmlu,
        mmlu_limit=args.mmlu_limit,
        seed=args.seed,
        backbone=BackboneOptions(model=args.model, device=args.device),
    )
    command.run()
    output = args.output or ROOT / "results" / f"forgetting_{args.what}.json"
    found = json.loads((folder / "forgetting.json").read_text())
    if args.join:
        try:
            found = joined(json.loads(args.join.read_text(encoding="utf-8")), found)
        except ValueError as error:
            raise SystemExit(f"{args.join} and {folder / 'forgetting.json'}: {error}") from error
        draw(found["points"], folder)
    write_atomically(output, (json.dumps(finite(found), indent=1) + "\n").encode())
    if (folder / "forgetting.png").exists():
        write_atomically(output.with_suffix(".png"), (folder / "forgetting.png").read_bytes())
    return 0


def choose(folder: Path, books: str | None, unrelated: str | None, most: int) -> tuple[list[str], list[str]]:
    """Paths of the books to learn, and of the unrelated ones."""
    every = sorted(folder.glob("*.txt"))
    if len(every) < 2:
        raise SystemExit(f"{folder} has {len(every)} books; at least 2 are needed")
    learnt = [folder / f"{name}.txt" for name in books.split(",")] if books else every[::2][:most]
    others = [folder / f"{name}.txt" for name in unrelated.split(",")] if unrelated else every[1::2][:most]
    return [str(p) for p in learnt], [str(p) for p in others]


def table(result: dict[str, Any]) -> str:
    """The frontier as Markdown: every configuration and scale, KL at equal gain, MMLU."""
    settings = result["settings"]["forgetting"]
    books = len({row["book"] for row in result["rows"]})
    points = [
        [
            p["label"],
            f"{p['scale']:g}",
            f"{p['parameters']:,}",
            f"{p['gain']:+.4f}",
            f"{p['kl']:.4f}",
            f"{p['bits_per_byte_change']:+.4f}",
        ]
        for p in result["points"]
    ]
    tokens = sorted({row["tokens"] for row in result["rows"]})
    learnt = f"{tokens[0]:,}" + (f" to {tokens[-1]:,}" if len(tokens) > 1 else "")
    exact = "identical to the last bit" if result["bit_exact"] else "NOT identical"
    parts = [
        f"## Forgetting: {books} book{'s' * (books != 1)}, {learnt} tokens learnt of each\n"
        f"Gain: nats per token on the next {settings['later_tokens']:,} tokens of the book. KL(backbone || with what "
        f"was learnt), nats per token, and change of bits per byte: on unrelated books. With nothing attached, the "
        f"backbone's logits and weights were {exact} in every run.\n",
        markdown(["method", "output scale", "parameters", "gain", "KL", "bits per byte"], points),
    ]
    for pair in result["at_equal_gain"]:
        if pair["at"]:
            names = list(pair["at"][0]["books"])
            rows = [
                [f"{x['share']:.0%}", *(_apart(x["books"][name]) for name in names), f"{x['ratio']:.2f}"]
                for x in pair["at"]
            ]
            parts.append(
                f"`{pair['method']}` and `{pair['against']}` at equal gain, shares of the largest that both reach on a "
                "book: gain, KL of the two, their ratio. KL: the least of any rank, step size and scale, interpolated "
                "between scales.\n"
            )
            parts.append(markdown(["of the gain", *names, "ratio, geometric mean"], rows))
        if pair["left_out"]:
            parts.append(f"One of the two gains nothing on {', '.join(pair['left_out'])}.\n")
    parts += [_mmlu(result["mmlu"])] if result["mmlu"] else []
    parts += [f"{row['label']} diverged on {row['book']}.\n" for row in result["failed"]]
    return "\n".join(parts)


def _apart(x: dict[str, float]) -> str:
    return f"{x['gain']:.3f}: {x['kl']:.4f} / {x['kl_against']:.4f} = {x['ratio']:.2f}"


def _mmlu(mmlu: dict[str, Any]) -> str:
    rows = [["nothing learnt", f"{100 * mmlu['accuracy']:.2f}", ""]]
    for label, accuracy in mmlu["after"].items():
        rows.append([label, f"{100 * accuracy:.2f}", f"{100 * (accuracy - mmlu['accuracy']):+.2f}"])
    return (
        f"MMLU, {mmlu['n']:,} questions, {mmlu['shots']} examples each, lm-evaluation-harness {mmlu['harness']}; "
        f"standard error {100 * mmlu['standard_error']:.2f}; {mmlu['cut']} prompts were cut to fit.\n\n"
        + markdown(["", "accuracy, %", "change"], rows)
    )


if __name__ == "__main__":
    sys.exit(main())
