"""Trains locas's built-in backbones, step by step; README.md beside this file says how.

python recipes/pretrain/main.py check|prepare|train|export|evaluate|card|split|join --help
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `pretrain` is found, wherever this is run from

import torch

from locas.store import write_atomically
from pretrain import evaluate as evaluation
from pretrain import export as exporting
from pretrain import overlap
from pretrain import prepare as preparing
from pretrain.books import files, read_books
from pretrain.settings import DATA, HOME, MODELS, PRESETS, RUNS
from pretrain.state import start
from pretrain.train import train

SHARED = Path("../shared/data")


def _check(args: argparse.Namespace) -> None:
    texts = overlap.evaluation_texts(args.books)
    found = overlap.check((book for path in files(args.source) for book in read_books(path)), texts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(found, indent=1).encode())
    print(overlap.table(found))
    print(f"written to {args.out}")


def _prepare(args: argparse.Namespace) -> None:
    if not args.overlap.exists():
        raise FileNotFoundError(
            f"{args.overlap} does not exist; run `main.py check` first, so that its books are dropped"
        )
    drop = frozenset(json.loads(args.overlap.read_text())["drop"])
    preparing.clear(args.out)
    made = preparing.prepare(args.source, args.out, share=args.share, seed=args.seed, drop=drop, vocab=args.vocab)
    print(preparing.summary(made))
    if args.dev is not None:
        print(f"development books: {preparing.copy_books(args.dev, HOME / 'dev') / 2**20:.2f} MiB in {HOME / 'dev'}")


def _train(args: argparse.Namespace) -> None:
    preset = PRESETS[args.preset].changed(
        tokens=args.tokens, lr=args.lr, batch=args.batch, micro_batch=args.micro_batch, context=args.context,
        stable_context=args.stable_context, seed=args.seed, log_every=args.log_every, valid_every=args.valid_every,
    )  # fmt: skip
    device = torch.device(args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    folder = args.run or RUNS / args.model
    run = start(args.model, preset, args.data, folder, device, args.warm_start)
    train(
        run, args.data, minutes=args.minutes, until_step=args.until_step, compiled=compiled,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip


def _export(args: argparse.Namespace) -> None:
    print(f"{exporting.export(args.run, args.data, args.out) / 1e6:.1f} MB of weights in {args.out}")


def _evaluate(args: argparse.Namespace) -> None:
    found = evaluation.evaluate(args.folder, args.books, device=args.device, max_tokens=args.max_tokens)
    print(json.dumps(found["mean_bits_per_byte"]))


def _card(args: argparse.Namespace) -> None:
    evaluation.write_card(args.folder)
    print(f"{args.folder / 'README.md'} and SHA256SUMS")


def _split(args: argparse.Namespace) -> None:
    for path in exporting.split(args.folder, args.out):
        print(f"{path} {path.stat().st_size / 2**20:.2f} MiB")


def _join(args: argparse.Namespace) -> None:
    print("\n".join(exporting.join(args.pieces, args.name, args.out)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)

    def add(name: str, does: object, about: str) -> argparse.ArgumentParser:
        step = steps.add_parser(name, help=about, description=about)
        step.set_defaults(does=does)
        return step

    source = {"type": Path, "default": SHARED / "pretrain", "help": "folder with train-*.txt.xz and valid.txt.xz"}
    data = {"type": Path, "default": DATA, "help": "folder that `prepare` wrote"}
    found = HOME / "overlap.json"

    step = add("check", _check, "Measure how much of the evaluation books stands in the training text.")
    step.add_argument("--source", **source)
    step.add_argument("--books", type=Path, default=SHARED / "books", help="folder with dev/*.txt and test/*.txt")
    step.add_argument("--out", type=Path, default=found, help="the result; `prepare` reads it")

    step = add("prepare", _prepare, "Train the tokenizer and pack the training text into shards of token ids.")
    step.add_argument("--source", **source)
    step.add_argument("--out", **data)
    step.add_argument("--overlap", type=Path, default=found, help="what `check` wrote; its books are dropped")
    step.add_argument("--share", type=float, default=0.78, help="of the training books that are kept, drawn by hash")
    step.add_argument("--vocab", type=int, default=preparing.VOCAB, help="entries of the tokenizer")
    step.add_argument("--seed", type=int, default=0, help="of form, typography and share")
    step.add_argument("--dev", type=Path, help=f"development books, packed into {HOME / 'dev'} to travel")

    step = add("train", _train, "Train one of the twins, or go on with it.")
    step.add_argument("model", choices=MODELS)
    step.add_argument("--preset", choices=PRESETS, default="cpu")
    step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    step.add_argument("--minutes", type=float, default=math.inf, help="stop at a checkpoint after so long")
    step.add_argument("--until-step", type=int, help="stop at a checkpoint at this step")
    step.add_argument("--data", **data)
    step.add_argument("--run", type=Path, help=f"folder of checkpoint and result (default: {RUNS}/MODEL)")
    step.add_argument("--warm-start", type=Path, help="folder of exported weights to go on from without a checkpoint")
    step.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    step.add_argument("--deterministic", action="store_true", help="the same bits again on CUDA; slower")
    for name in ("tokens", "batch", "micro-batch", "context", "stable-context", "seed", "log-every", "valid-every"):
        step.add_argument(f"--{name}", type=int, help="in place of the preset's")
    step.add_argument("--lr", type=float, help="in place of the preset's")

    step = add("export", _export, "Write a run's weights as a Hugging Face folder in bfloat16.")
    step.add_argument("run", type=Path)
    step.add_argument("out", type=Path)
    step.add_argument("--data", **data)

    step = add("evaluate", _evaluate, "Score an exported folder on books; write its model card and checksums.")
    step.add_argument("folder", type=Path)
    step.add_argument("--books", type=Path, default=HOME / "dev", help="folder of *.txt or *.txt.xz")
    step.add_argument("--device", default="auto")
    step.add_argument("--max-tokens", type=int, help="only so many of each book")

    step = add("card", _card, "Write the model card and checksums again, from what training and evaluation left.")
    step.add_argument("folder", type=Path)

    step = add("split", _split, "Cut an exported folder into pieces that travel.")
    step.add_argument("folder", type=Path)
    step.add_argument("out", type=Path)

    step = add("join", _join, "Put pieces together again.")
    step.add_argument("pieces", type=Path)
    step.add_argument("name", help="what the pieces' names begin with")
    step.add_argument("out", type=Path)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Runs one step; a message and status 1 for what the user can mend."""
    args = _parser().parse_args(words)
    try:
        args.does(args)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
