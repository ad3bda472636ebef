"""What composing two books costs each, and what rounding a merged checkpoint to bfloat16 costs, on development books.

    python recipes/compose_books.py ../shared/data/books/dev             # resumable: goes on where it stopped
    python recipes/compose_books.py ../shared/data/books/dev --books 26239,27454 --read-tokens 4096 --later-tokens 2048
    python recipes/compose_books.py --table

A memory reads the beginning of each book. Pairs of neighbours (in the order of their names, the last with the first)
are composed, and each book's gain over no memory, in nats a token, is measured without learning on the text that
follows (held out) and on the text that was read: with its own memory, and with both. Kept = the second over the first.
Remedies:

* `half weights`: each part's weight 0.5, `three quarters`: 0.75;
* `rank N/2`: memories of half the rank, composed to the rank of one;
* `orthogonal`: the second memory's keys and gates lose, row by row, what lies in the span of the first's (QR);
* `fitted`: `compose(..., fit=...)` on the text that each has read; `predictions fitted`: the same with the parts'
  predictions only, and no share of the text's own tokens;
* `frozen growth`: not composed: the first memory is frozen and grows as many slots, which read the second book.

Rounding: each book's memory is merged with `--dtype float32`, and the result is then rounded to bfloat16 as a whole;
beside it the backbone rounded to bfloat16 without memory, and with the attached float32 memory. All run in float32
arithmetic, so that what differs is the weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from _rows import WORTH_NATS, Books, Row, by_place, mean, parser, run, share
from markdown_table import markdown

import locas
from locas.compose import compose
from locas.composed_fit import FitSettings
from locas.grow import freeze, grow
from locas.memory import Memory
from locas.merge import merge

BOTH = ("first", "second")
COMPOSED = {
    "plain": "sum of both",
    "half weights": "sum, weights 0.5",
    "three quarters": "sum, weights 0.75",
    "orthogonal": "sum, the second's keys and gates orthogonal to the first's",
    "predictions fitted": "fitted to the parts' predictions on both texts (`--fit --fit-text-share 0`)",
    "fitted": "fitted, with a share of the texts' own tokens (`--fit`)",
    "frozen growth": "not composed: the first frozen, new slots read the second book",
}


def main() -> int:
    """Runs what is missing, writing the result after every row."""
    args = parser(__doc__, "results/compose_books.json").parse_args()
    return run(args, "compose_books", rows, table)


def rows(books: Books, args: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """What is not known yet."""
    if len(books.names) < 2:
        raise SystemExit("composing takes two books or more")
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
            "predictions fitted",
            "fitted",
            "frozen growth",
        ):
            if ("compose", what, first, second) not in done:
                yield composed(books, args, what, first, second)
    for name in books.names:
        if ("rounding", "merged bf16", name, "") not in done:
            yield from rounding(books, args, name)


def composed(books: Books, args: argparse.Namespace, what: str, first: str, second: str) -> Row:
    """Each book's gain with its own memory (of the full rank) and with both."""
    began = time.perf_counter()
    both = together(books, args, what, first, second)
    row: Row = {"part": "compose", "what": what, "first": first, "second": second}
    row["seconds"] = round(time.perf_counter() - began, 1)
    for name, which in ((first, "first"), (second, "second")):
        plain, own = books.without(name), books.with_own(name, args.rank)
        with_both = books.losses(name, both)
        for i, span in enumerate(("later", "read")):
            row[f"{which}_gain_{span}"] = plain[i] - own[i]
            row[f"{which}_gain_both_{span}"] = plain[i] - with_both[i]
    for span in ("later", "read"):
        alone = row[f"first_gain_{span}"] + row[f"second_gain_{span}"]
        row[f"kept_{span}"] = (row[f"first_gain_both_{span}"] + row[f"second_gain_both_{span}"]) / alone
    return row


def together(books: Books, args: argparse.Namespace, what: str, first: str, second: str) -> Memory:
    """One memory for both books."""
    rank = args.rank // 2 if what.startswith("rank") else args.rank
    one, two = books.memory(first, rank), books.memory(second, rank)
    if what == "frozen growth":
        return grown(books, args, one, second)
    if what == "orthogonal":
        return compose([one, orthogonal(two, one)])
    if "fitted" in what:
        settings = FitSettings() if what == "fitted" else FitSettings(text_share=0.0)
        texts = [books.read_part(name) for name in (first, second)]
        model, start = books.backbone.model, books.backbone.start_id
        return compose([one, two], fit=texts, model=model, start_id=start, settings=settings)
    return compose([one, two], weights=[{"half weights": 0.5, "three quarters": 0.75}.get(what, 1.0)] * 2)


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
    model, start, ids = books.backbone.model, books.backbone.start_id, books.read_part(second)
    memory = grow(freeze(one), model, ids[:256], args.rank, start_id=start)
    list(locas.read(model, memory, ids, books.settings, start_id=start))
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
        "no memory float32": books.without(name),
        "attached float32": books.with_own(name, args.rank),
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


def table(report: Row) -> str:
    """How much of each book's gain is left in a composed memory, means over pairs; and what rounding costs."""
    parts = []
    for where, rows in by_place(report["results"]):
        pairs = [r for r in rows if r["part"] == "compose"]
        lines = []
        for what in dict.fromkeys(r["what"] for r in pairs):
            mine = [r for r in pairs if r["what"] == what]
            name = COMPOSED.get(what, f"sum of memories of {what}")
            figures = [
                share([r[f"kept_{span}"] for r in mine if sum(r[f"{who}_gain_{span}"] for who in BOTH) > WORTH_NATS])
                for span in ("later", "read")
            ]
            books = [(r, who) for r in mine for who in BOTH if r[f"{who}_gain_later"] > WORTH_NATS]
            worst = min((r[f"{who}_gain_both_later"] / r[f"{who}_gain_later"] for r, who in books), default=math.nan)
            lines.append([name, *figures, "" if math.isnan(worst) else f"{100 * worst:.0f}%", str(len(mine))])
        parts.append(
            f"## Two books in one memory: {where}\n"
            "What is kept of the two books' gain over no memory (nats a token, nothing being learnt), in per cent of "
            f"the gain with each one's own memory where that is above {WORTH_NATS}; means over pairs of development "
            "books, with 95% intervals.\n\n"
            + markdown(["both books in one", "kept on what follows", "on what was read", "worst book", "pairs"], lines)
        )
        rounded = [r for r in rows if r["part"] == "rounding"]
        lines = []
        for what in dict.fromkeys(r["what"] for r in rounded):
            mine = [r for r in rounded if r["what"] == what]
            lines.append(
                [what, *(mean([r[f"nats_{span}"] for r in mine]) for span in ("later", "read")), str(len(mine))]
            )
        if lines:
            parts.append(
                "Rounding a merged checkpoint to bfloat16, means over books; arithmetic in float32 throughout.\n\n"
                + markdown(["weights", "nats a token on what follows", "on what was read", "books"], lines)
            )
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
