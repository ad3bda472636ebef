"""How much of a memory's gain survives compression, and NL-SVD against plain gradient steps, on development books.

    python recipes/compress.py ../shared/data/books/dev                  # resumable: goes on where it stopped
    python recipes/compress.py ../shared/data/books/dev --books 26239 --read-tokens 4096 --later-tokens 2048
    python recipes/compress.py --table

Memories read as `locas memorize` reads. Part "survival": a memory reads the beginning of a book; it is compressed to
half and a quarter of its rank by each method, fitted to the activations of the last part of what was read. Its gain
over no memory, in nats a token, is measured without learning on the text that follows (held out) and on the text that
was read, and compared with the gain before.

Part "cycle": Locas-MLP reads the same beginning online, with slots filled step by step and compressed by NL-SVD to the
rank whenever the capacity (twice the rank, or rank and chunk) is reached; against a memory of the rank, and one of
the capacity, that is filled once and then takes gradient steps, ones that take gradient steps only (keys by top-k, or
from activations), and none. Reported: online loss and seconds. Slots from activations take a token each, and the
capacity is more than the first chunk has: that memory is made from as many tokens. An online score may not have seen
what follows, so the loss of every row, none included, is that of the tokens after the first `scored_from` (the
capacity), from which memories are made. Rows of before say no `scored_from`: they are tabled apart, and measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from _rows import SEED, WORTH_NATS, Books, Row, by_place, mean, parser, run, share
from markdown_table import markdown

import locas
from locas.compress import METHODS, compress
from locas.cycle import read_and_compress
from locas.run_settings import PRESETS

FITTED_TOKENS = 4096


def main() -> int:
    """Runs what is missing, writing the result after every row."""
    options = parser(__doc__, "results/compress.json")
    options.add_argument("--part", choices=("survival", "cycle"), action="append", help="default: both")
    return run(options.parse_args(), "compress", rows, table, PRESETS["default"].read)


def rows(books: Books, args: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """What is not known yet, book by book."""
    parts = {"survival": survival, "cycle": cycle}
    for book in books.names:
        for part in args.part or parts:
            mine = [r for r in known if (r["book"], r["part"]) == (book, part)]
            done = [r["what"] for r in mine if part != "cycle" or "scored_from" in r]
            for row in parts[part](books, book, args, done):
                yield {"book": book, "part": part} | row


# -------------------------------------------------------------------- survival


def survival(books: Books, book: str, args: argparse.Namespace, known: list[str]) -> Iterator[Row]:
    """A row for the whole memory, and for each variant, method and rank."""
    for variant in ("glu", "mlp"):
        methods = [m for m in METHODS if variant == "mlp" or not m.startswith("nl-svd")]
        plan = [(m, args.rank // divisor) for divisor in (2, 4) for m in methods]
        names = [f"{variant} {m} {rank}" for m, rank in plan]
        if all(name in known for name in (f"{variant} whole", *names)):
            continue
        memory = books.learnt(book, locas.InitSettings(args.rank, variant, seed=SEED))
        nothing, whole = books.without(book), books.losses(book, memory)
        if f"{variant} whole" not in known:
            yield {"what": f"{variant} whole", "gain_later": nothing[0] - whole[0], "gain_read": nothing[1] - whole[1]}
        for (method, rank), name in zip(plan, names, strict=True):
            if name in known:
                continue
            model, start = books.backbone.model, books.backbone.start_id
            began = time.perf_counter()
            small = compress(memory, model, books.read_part(book)[-FITTED_TOKENS:], rank, method=method, start_id=start)
            seconds = time.perf_counter() - began
            after = books.losses(book, small.memory)
            yield {
                "what": name,
                "gain_later": nothing[0] - after[0],
                "gain_read": nothing[1] - after[1],
                "left_later": (nothing[0] - after[0]) / (nothing[0] - whole[0]),
                "left_read": (nothing[1] - after[1]) / (nothing[1] - whole[1]),
                "function_error": small.error,
                "seconds": round(seconds, 1),
            }


# -------------------------------------------------------------------- cycle


def cycle(books: Books, book: str, args: argparse.Namespace, known: list[str]) -> Iterator[Row]:
    """Online reading of the first part: NL-SVD, gradient steps, and no memory."""
    backbone, ids, rank, start = books.backbone, books.read_part(book), args.rank, books.backbone.start_id
    # The capacity holds a chunk's tokens besides what compressing leaves.
    chunk = books.settings.sizes(backbone.model)[1]
    capacity = max(2 * rank, rank + chunk)
    if ids.numel() <= capacity:
        raise SystemExit(f"nothing of {book} is scored: {capacity} tokens go before; use more with --read-tokens")
    for what, init, slots in (
        ("none", None, 0),
        ("nl-svd cycle", "step-wise", capacity),
        ("step-wise, then gradient", "step-wise", rank),
        ("top-k, then gradient", "top-k", rank),
        ("activation, then gradient", "activation", rank),
        ("step-wise, then gradient, capacity", "step-wise", capacity),
        ("activation, then gradient, capacity", "activation", capacity),
    ):
        if what in known:
            continue
        memory = None
        if init is not None:
            made = locas.InitSettings(rank=slots, seed=SEED, variant="mlp", init=init)  # type: ignore[arg-type]
            memory = locas.create(backbone.model, ids[: max(chunk, slots)], made, start_id=start)
        began, compressed = time.perf_counter(), 0
        if what == "nl-svd cycle":
            assert memory is not None
            steps = list(read_and_compress(backbone.model, memory, ids, rank, books.settings, start_id=start))
            records, compressed = [step.record for step in steps], sum(step.compressed for step in steps)
        else:
            records = list(locas.read(backbone.model, memory, ids, books.settings, start_id=start))
        seconds = time.perf_counter() - began
        nll = torch.cat([record.nll for record in records]).double()
        yield {
            "what": what,
            "nats": float(nll[capacity:].nanmean()),
            "scored_from": capacity,
            "slots": slots,
            "compressions": compressed,
            "seconds": round(seconds, 1),
        }


# -------------------------------------------------------------------- table


def table(report: Row) -> str:
    """How much of a memory's gain survives compression; NL-SVD against gradient steps. Means over books."""
    parts = []
    for where, rows in by_place(report["results"]):
        survival = [r for r in rows if r["part"] == "survival"]
        whole = [r for r in survival if r["what"].endswith(" whole")]
        gains = {
            (r["book"], r["what"].split()[0], span): r[f"gain_{span}"] for r in whole for span in ("later", "read")
        }
        lines = []
        for what in dict.fromkeys(r["what"] for r in survival if not r["what"].endswith(" whole")):
            mine = [r for r in survival if r["what"] == what]
            variant, method, slots = what.split()
            figures = [
                share([r[f"left_{span}"] for r in mine if gains[r["book"], variant, span] > WORTH_NATS])
                for span in ("later", "read")
            ]
            figures.append(share([r["function_error"] for r in mine]))
            seconds = sum(r["seconds"] for r in mine) / len(mine)
            lines.append(
                [f"Locas-{variant.upper()}, {slots} slots, `{method}`", *figures, f"{seconds:.1f}", str(len(mine))]
            )
        if lines:
            parts.append(
                f"## Compressed memories: {where}\n"
                f"What is left of the gain over no memory (nothing being learnt) where that is above {WORTH_NATS} nats "
                "a token, and the relative difference of the memory's function on activations that it was not fitted "
                "to; means over development books, with 95% intervals.\n\n"
                + markdown(
                    ["memory", "left on what follows", "on what was read", "difference", "seconds", "books"], lines
                )
            )
        online = [r for r in rows if r["part"] == "cycle"]
        for first in sorted({r.get("scored_from", 0) for r in online}, reverse=True):
            if online_part := online_table(where, first, [r for r in online if r.get("scored_from", 0) == first]):
                parts.append(online_part)
    return "\n".join(parts)


def online_table(where: str, first: int, rows: list[Row]) -> str:
    """Part "cycle": each row's loss against no memory on the same tokens, those after the first `first`; "" without."""
    plain = {r["book"]: r["nats"] for r in rows if r["what"] == "none"}
    lines = []
    for what in dict.fromkeys(r["what"] for r in rows if r["what"] != "none"):
        mine = [r for r in rows if r["what"] == what and r["book"] in plain]
        if mine:
            change = mean([r["nats"] - plain[r["book"]] for r in mine], "+")
            seconds = sum(r["seconds"] for r in mine) / len(mine)
            lines.append([what, str(mine[0]["slots"]), change, f"{seconds:.1f}", str(len(mine))])
    if not lines:
        return ""
    on = (
        f"on what is read after the first {first:,} tokens, from which memories are made: every token is scored before "
        "anything has seen it"
        if first
        else "on all that is read, every token scored before it is learnt; but slots from activations at the capacity "
        "were made from a few tokens of the second chunk, too, before these were scored"
    )
    return (
        f"### Locas-MLP, NL-SVD against gradient steps: {where}\n"
        f"Loss against no memory {on}; means over development books, with 95% intervals.\n\n"
        + markdown(["filled and learnt", "slots", "nats a token", "seconds", "books"], lines)
    )


if __name__ == "__main__":
    sys.exit(main())
