"""What composing two books costs each, and what rounding a merged checkpoint to bfloat16 costs, on development books.

    python recipes/compose_books.py ../shared/data/books/dev             # resumable: goes on where it stopped
    python recipes/compose_books.py ../shared/data/books/dev --books 26239,27454 --read-tokens 4096 --later-tokens 2048
    python recipes/compose_books.py --table

A memory reads the beginning of each book. Pairs of neighbours (in the order of their names, the last with the first)
are composed, and each book's gain over no memory, in nats a token, is measured without learning on the text that
follows (held out) and on the text that was read: with its own memory, and with both. Kept = the second over the first.
Remedies:

* `half weights`: each part's tau times 0.5, `three quarters`: times 0.75;
* `rank N/2`: memories of half the rank, composed to the rank of one;
* `orthogonal`: the second memory's keys and gates lose, row by row, what lies in the span of the first's (QR);
* `frozen growth`: not composed: the first memory is frozen and grows as many slots, which read the second book.

Rounding: each book's memory is merged with `--dtype float32`, and the result is then rounded to bfloat16 as a whole;
beside it the backbone rounded to bfloat16 without memory, and with the attached float32 memory. All run in float32
arithmetic, so that what differs is the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import locas
from locas.attach import attached
from locas.backbone import Backbone
from locas.compose import compose
from locas.grow import freeze, grow
from locas.memory import Memory
from locas.merge import merge
from locas.store import write_atomically
from locas.text import collect

sys.path.insert(0, str(Path(__file__).parent))
from sweep import _environment as environment

Row = dict[str, Any]
SEED = 0


def main() -> int:
    """Runs what is missing, writing the result after every row."""
    args = parse()
    report = json.loads(args.output.read_text()) if args.output.exists() else {"results": []}
    if args.table or args.folder is None:
        print(table(report["results"]))
        return 0
    torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    backbone = locas.load_backbone(args.model)
    paths = [b for b in sorted(args.folder.glob("*.txt")) if not args.books or b.stem in args.books.split(",")]
    if len(paths) < 2:
        raise SystemExit("composing takes two books or more")
    books = Books(backbone, paths, args)
    place = {k: getattr(args, k) for k in ("rank", "skip_tokens", "read_tokens", "later_tokens")}
    place |= {"backbone": backbone.name, "seed": SEED}
    for row in rows(books, args, [r for r in report["results"] if {k: r[k] for k in place} == place]):
        report["results"].append(place | row)
        report |= environment(backbone) | {"recipe": "compose_books"}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, (json.dumps(report, indent=1) + "\n").encode())
        print(row, flush=True)
    print(table(report["results"]))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder with the development books")
    parser.add_argument("--books", help="only these, by file stem, with commas between")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--read-tokens", type=int, default=16384, help="of each book, read into its memory")
    parser.add_argument("--skip-tokens", type=int, default=0, help="of each book, left out (title pages, contents)")
    parser.add_argument("--later-tokens", type=int, default=8192, help="that follow, on which gains are measured")
    parser.add_argument("--model", help="backbone (default: the built-in one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/compose_books.json"))
    parser.add_argument("--table", action="store_true", help="print what has been measured, and stop")
    return parser.parse_args()


class Books:
    """The books' token ids and memories, each made when it is first asked for."""

    def __init__(self, backbone: Backbone, paths: list[Path], args: argparse.Namespace) -> None:
        self.backbone, self.args, self.memories = backbone, args, {}  # type: ignore[var-annotated]
        self.names = [path.stem for path in paths]
        self.ids: dict[str, Tensor] = {}
        for path in paths:
            (document,) = collect([path], gutenberg=True, reflow=True)
            ids, _ = backbone.encode(document.text, args.skip_tokens + args.read_tokens + args.later_tokens)
            self.ids[path.stem] = ids[args.skip_tokens :]

    def settings(self) -> locas.ReadSettings:
        return locas.ReadSettings(start_in_every_window=self.backbone.start_in_every_window)

    def memory(self, name: str, rank: int) -> Memory:
        """Of one book's beginning."""
        if (name, rank) not in self.memories:
            model, start, ids = self.backbone.model, self.backbone.start_id, self.ids[name][: self.args.read_tokens]
            memory = locas.create(model, ids[:256], locas.InitSettings(rank=rank, seed=SEED), start_id=start)
            list(locas.read(model, memory, ids, self.settings(), start_id=start))
            self.memories[name, rank] = memory
        return self.memories[name, rank]

    def losses(self, name: str, memory: Memory | None, model: Any = None) -> tuple[float, float]:
        """Nats a token on the later part and on the part that was read, nothing being learnt."""
        model, start = model or self.backbone.model, self.backbone.start_id
        if memory is not None and model is not self.backbone.model:
            with attached(model, memory.bank):  # a rounded backbone is another one: its fingerprint may differ
                return self.losses(name, None, model)
        records = locas.read(model, memory, self.ids[name], self.settings(), start_id=start, learn=False)
        nll = torch.cat([record.nll for record in records]).double()
        return float(nll[self.args.read_tokens :].nanmean()), float(nll[: self.args.read_tokens].nanmean())


def rows(books: Books, args: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """What is not known yet."""
    done = {(r["part"], r["what"], r["first"], r["second"]) for r in known}
    pairs = [(name, books.names[(i + 1) % len(books.names)]) for i, name in enumerate(books.names)]
    pairs = pairs[:1] if len(books.names) == 2 else pairs
    for first, second in pairs:
        for what in (
            "plain",
            "half weights",
            "three quarters",
            f"rank {args.rank // 2}",
            "orthogonal",
            "frozen growth",
        ):
            if ("compose", what, first, second) not in done:
                yield composed(books, args, what, first, second)
    for name in books.names:
        if ("rounding", "merged bf16", name, "") not in done:
            yield from rounding(books, args, name)


def composed(books: Books, args: argparse.Namespace, what: str, first: str, second: str) -> Row:
    """Each book's gain with its own memory (of the full rank) and with both."""
    rank = args.rank // 2 if what.startswith("rank") else args.rank
    one, two = books.memory(first, rank), books.memory(second, rank)
    if what == "frozen growth":
        both = grown(books, args, one, second)
    elif what == "orthogonal":
        both = compose([one, orthogonal(two, one)])
    else:
        weight = {"half weights": 0.5, "three quarters": 0.75}.get(what, 1.0)
        both = compose([weighted(one, weight), weighted(two, weight)])
    row: Row = {"part": "compose", "what": what, "first": first, "second": second}
    for name, which in ((first, "first"), (second, "second")):
        plain, own = books.losses(name, None), books.losses(name, books.memory(name, args.rank))
        with_both = books.losses(name, both)
        for i, span in enumerate(("later", "read")):
            row[f"{which}_gain_{span}"] = plain[i] - own[i]
            row[f"{which}_gain_both_{span}"] = plain[i] - with_both[i]
    for span in ("later", "read"):
        alone = row[f"first_gain_{span}"] + row[f"second_gain_{span}"]
        row[f"kept_{span}"] = (row[f"first_gain_both_{span}"] + row[f"second_gain_both_{span}"]) / alone
    return row


def weighted(memory: Memory, weight: float) -> Memory:
    """The same memory, its output scaled."""
    bank = memory.bank.clone()
    bank.tau.mul_(weight)
    return Memory(bank, memory.provenance)


@torch.no_grad()
def orthogonal(memory: Memory, other: Memory) -> Memory:
    """The memory whose keys (and gates) have lost their part in the span of the other's; lengths are not restored."""
    bank = memory.bank.clone()
    for layer in bank.layers:
        mine, theirs = bank.slots(layer), other.bank.slots(layer)
        for part, taken in ((mine.k, theirs.k), (mine.g, theirs.g)):
            if part is not None and taken is not None:
                basis = torch.linalg.qr(taken[0].double().T).Q
                part[0] = (part[0].double() - part[0].double() @ basis @ basis.T).to(part.dtype)
    return Memory(bank, memory.provenance)


def grown(books: Books, args: argparse.Namespace, one: Memory, second: str) -> Memory:
    """The first memory frozen, with as many new slots that have read the second book."""
    model, start, ids = books.backbone.model, books.backbone.start_id, books.ids[second][: args.read_tokens]
    memory = grow(freeze(one), model, ids[:256], args.rank, start_id=start)
    list(locas.read(model, memory, ids, books.settings(), start_id=start))
    return memory


def rounding(books: Books, args: argparse.Namespace, name: str) -> Iterator[Row]:
    """Perplexity with the attached float32 memory and with the merged checkpoint, in float32 and rounded."""
    memory = books.memory(name, args.rank)
    row: Row = {"part": "rounding", "first": name, "second": ""}
    with tempfile.TemporaryDirectory() as folder:
        memory.save(Path(folder, "m.safetensors"))
        merge([Path(folder, "m.safetensors")], Path(folder, "merged"), model=args.model, dtype="float32")
        merged = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "merged"), dtype=torch.float32).eval()
        wide = books.losses(name, None, merged)
        narrow = books.losses(name, None, rounded(merged))
    plain = locas.load_backbone(args.model).model
    measured = {
        "no memory float32": books.losses(name, None),
        "attached float32": books.losses(name, memory),
        "merged float32": wide,
        "no memory bf16": books.losses(name, None, rounded(plain)),
        "attached float32 to bf16": books.losses(name, memory, rounded(plain)),
        "merged bf16": narrow,
    }
    for what, (later, read) in measured.items():
        yield row | {"what": what, "nats_later": later, "nats_read": read}


@torch.no_grad()
def rounded(model: Any) -> Any:
    """Every weight rounded to bfloat16, in float32 still."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def table(results: list[Row]) -> str:
    """Means over pairs or books."""
    lines = []
    for part in ("compose", "rounding"):
        rows = [r for r in results if r["part"] == part]
        for what in dict.fromkeys(r["what"] for r in rows):
            mine = [r for r in rows if r["what"] == what]
            keys = [k for k in mine[0] if k.startswith(("kept", "nats"))]
            cells = "  ".join(f"{k} {sum(r[k] for r in mine) / len(mine):.4f}" for k in keys)
            lines.append(f"{part:<9} {what:<26} n {len(mine)}  {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
