"""How much of a memory's gain survives compression, and NL-SVD against plain gradient steps, on development books.

    python recipes/compress.py ../shared/data/books/dev                  # resumable: goes on where it stopped
    python recipes/compress.py ../shared/data/books/dev --books 26239 --read-tokens 4096 --later-tokens 2048
    python recipes/compress.py --table

Part "survival": a memory reads the beginning of a book; it is compressed to half and a quarter of its rank by each
method, fitted to the activations of the last part of what was read. Its gain over no memory, in nats a token, is
measured without learning on the text that follows (held out) and on the text that was read, and compared with the
gain before.

Part "cycle": Locas-MLP reads the same beginning online, with slots filled step by step and compressed by NL-SVD to the
rank whenever the capacity (twice the rank, or rank and chunk) is reached; against a memory of the rank, and one of
the capacity, that is filled once and then takes gradient steps, ones that take gradient steps only (activation keys),
and none. Reported: online loss and seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import locas
from locas.backbone import Backbone
from locas.compress import METHODS, compress
from locas.cycle import read_and_compress
from locas.memory import Memory
from locas.store import write_atomically
from locas.text import collect

sys.path.insert(0, str(Path(__file__).parent))
from sweep import _environment as environment

Row = dict[str, Any]
SEED = 0
FITTED_TOKENS = 4096


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
    books = [b for b in sorted(args.folder.glob("*.txt")) if not args.books or b.stem in args.books.split(",")]
    for book in books:
        (document,) = collect([book], gutenberg=True, reflow=True)
        ids, _ = backbone.encode(document.text, args.read_tokens + args.later_tokens)
        place = {"book": book.stem, "rank": args.rank, "read_tokens": args.read_tokens, "tokens": ids.numel()}
        place |= {"backbone": backbone.name, "seed": SEED}
        parts = {"survival": survival, "cycle": cycle}
        for name in args.part or parts:
            known = [
                r["what"] for r in report["results"] if {k: r[k] for k in (*place, "part")} == place | {"part": name}
            ]
            for row in parts[name](backbone, ids, args, known):
                report["results"].append(place | {"part": name} | row)
                report |= environment(backbone) | {"recipe": "compress"}
                args.output.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(args.output, (json.dumps(report, indent=1) + "\n").encode())
                print(book.stem, name, row, flush=True)
    print(table(report["results"]))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder with the development books")
    parser.add_argument("--books", help="only these, by file stem, with commas between")
    parser.add_argument("--part", choices=("survival", "cycle"), action="append", help="default: both")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--read-tokens", type=int, default=16384, help="of each book, read into the memory")
    parser.add_argument("--later-tokens", type=int, default=8192, help="that follow, on which gains are measured")
    parser.add_argument("--model", help="backbone (default: the built-in one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/compress.json"))
    parser.add_argument("--table", action="store_true", help="print what has been measured, and stop")
    return parser.parse_args()


# -------------------------------------------------------------------- survival


def survival(backbone: Backbone, ids: torch.Tensor, args: argparse.Namespace, known: list[str]) -> Iterator[Row]:
    """A row for no memory, the memory, and each variant, method and rank."""
    read, later = ids[: args.read_tokens], slice(args.read_tokens, ids.numel())
    for variant in ("glu", "mlp"):
        methods = [m for m in METHODS if variant == "mlp" or not m.startswith("nl-svd")]
        plan = [(m, args.rank // share) for share in (2, 4) for m in methods]
        names = [f"{variant} {m} {rank}" for m, rank in plan]
        if all(name in known for name in (f"{variant} whole", *names)):
            continue
        memory = learnt(backbone, read, args.rank, variant)
        nothing, whole = (losses(backbone, m, ids, later) for m in (None, memory))
        if f"{variant} whole" not in known:
            yield {"what": f"{variant} whole", "gain_later": nothing[0] - whole[0], "gain_read": nothing[1] - whole[1]}
        for (method, rank), name in zip(plan, names, strict=True):
            if name in known:
                continue
            began = time.perf_counter()
            small = compress(
                memory, backbone.model, read[-FITTED_TOKENS:], rank, method=method, start_id=backbone.start_id
            )
            seconds = time.perf_counter() - began
            after = losses(backbone, small.memory, ids, later)
            yield {
                "what": name,
                "gain_later": nothing[0] - after[0],
                "gain_read": nothing[1] - after[1],
                "left_later": (nothing[0] - after[0]) / (nothing[0] - whole[0]),
                "left_read": (nothing[1] - after[1]) / (nothing[1] - whole[1]),
                "function_error": small.error,
                "seconds": round(seconds, 1),
            }


def learnt(backbone: Backbone, ids: torch.Tensor, rank: int, variant: str) -> Memory:
    """A memory that has read a text; Locas-MLP with activation keys, so that all its slots took gradient steps."""
    init = locas.InitSettings(
        rank=rank,
        seed=SEED,
        variant=variant,
        init="auto" if variant == "glu" else "activation",  # type: ignore[arg-type]
    )
    memory = locas.create(backbone.model, ids[:256], init, start_id=backbone.start_id)
    list(locas.read(backbone.model, memory, ids, settings(backbone), start_id=backbone.start_id))
    return memory


def settings(backbone: Backbone) -> locas.ReadSettings:
    return locas.ReadSettings(start_in_every_window=backbone.start_in_every_window)


def losses(backbone: Backbone, memory: Memory | None, ids: torch.Tensor, later: slice) -> tuple[float, float]:
    """Nats a token on the later part and on the part before it, nothing being learnt."""
    records = locas.read(backbone.model, memory, ids, settings(backbone), start_id=backbone.start_id, learn=False)
    nll = torch.cat([record.nll for record in records]).double()
    return float(nll[later].nanmean()), float(nll[: later.start].nanmean())


# -------------------------------------------------------------------- cycle


def cycle(backbone: Backbone, ids: torch.Tensor, args: argparse.Namespace, known: list[str]) -> Iterator[Row]:
    """Online reading of the first part: NL-SVD, gradient steps, and no memory."""
    ids, rank, start = ids[: args.read_tokens], args.rank, backbone.start_id
    # The capacity holds a chunk's tokens besides what compressing leaves.
    chunk = settings(backbone).sizes(backbone.model)[1]
    capacity = max(2 * rank, rank + chunk)
    for what, init, slots in (
        ("none", None, 0),
        ("nl-svd cycle", "step-wise", capacity),
        ("step-wise, then gradient", "step-wise", rank),
        ("gradient", "activation", rank),
        ("step-wise, then gradient, capacity", "step-wise", capacity),
        ("gradient, capacity", "activation", capacity),
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
            steps = list(read_and_compress(backbone.model, memory, ids, rank, settings(backbone), start_id=start))
            records, compressed = [step.record for step in steps], sum(step.compressed for step in steps)
        else:
            records = list(locas.read(backbone.model, memory, ids, settings(backbone), start_id=start))
        seconds = time.perf_counter() - began
        nll = torch.cat([record.nll for record in records]).double()
        yield {
            "what": what,
            "nats": float(nll.nanmean()),
            "slots": slots,
            "compressions": compressed,
            "seconds": round(seconds, 1),
        }


# -------------------------------------------------------------------- table


def table(results: list[Row]) -> str:
    """Means over books."""
    lines = []
    for part in ("survival", "cycle"):
        rows = [r for r in results if r["part"] == part]
        for what in dict.fromkeys(r["what"] for r in rows):
            mine = [r for r in rows if r["what"] == what]
            keys = [k for k, v in mine[0].items() if isinstance(v, float)]
            cells = "  ".join(f"{k} {sum(r[k] for r in mine) / len(mine):.3f}" for k in keys)
            lines.append(f"{part:<9} {what:<34} books {len(mine)}  {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
