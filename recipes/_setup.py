"""What recipes that run on development books begin with: their options, a quiet backbone, the books, a result file.

A result file holds rows of one backbone (its weights, not its name) and one version of locas and torch: `resumed` takes
no other. Commits of one version may be mixed: what is known is not measured again because code was committed, and each
row says which `commit` it was measured at. Where a commit changes what is measured, give another file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

import locas
from locas.backbone import Backbone
from locas.evaluate.cells import finite
from locas.store import write_atomically

_VERSIONS = ("locas", "torch")


def options(
    description: str | None, books: str | None = None, max_tokens: int | None = None
) -> argparse.ArgumentParser:
    """The options that all of them have. books: the default, by file stem; None: all."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="folder with the development books")
    add("--books", default=books, help=f"only these, by file stem, with commas between (default: {books or 'all'})")
    add("--max-tokens", type=int, default=max_tokens, help=f"of each book's beginning (default: {max_tokens or 'all'})")
    add("--model", help="backbone (default: the built-in one)")
    add("--threads", type=int, help="CPU threads")
    add("--table", action="store_true", help="print what has been measured, and stop")
    return parser


def quiet_backbone(args: argparse.Namespace) -> Backbone:
    """The backbone that was asked for, on so many threads; transformers says nothing."""
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return locas.load_backbone(args.model)


def book_paths(args: argparse.Namespace) -> list[Path]:
    """The books that were asked for, by name.

    Raises:
        SystemExit: one of them is not in the folder, or there is none at all.
    """
    found = {path.stem: path for path in sorted(args.folder.glob("*.txt"))}
    wanted = args.books.split(",") if args.books else list(found)
    missing = [stem for stem in wanted if stem not in found]
    if missing or not wanted:
        raise SystemExit(
            f"{args.folder} has no {', '.join(missing) or '*.txt'}; it has {', '.join(found) or 'nothing'}"
        )
    return [path for stem, path in found.items() if stem in wanted]


def resumed(path: Path, here: dict[str, Any], option: str = "-o") -> dict[str, Any]:
    """The result file to go on with; without rows where there is none yet.

    Args:
        path: of the file.
        here: what `locas.evaluate.provenance.environment` says now.
        option: by which another file can be named.

    Raises:
        SystemExit: its rows are of another backbone, or of another version of locas or torch.
    """
    report = read_report(path)
    compared = [("backbone", "weights_sha256"), ("backbone", "tokenizer_sha256"), *(("versions", p) for p in _VERSIONS)]
    others = [
        f"{key} is {found} there and {here[part][key]} here"
        for part, key in compared
        if (found := report.get(part, {}).get(key, "not noted")) != here[part][key]
    ]
    if others and report["results"]:
        raise SystemExit(
            f"{path} cannot be gone on with: {'; '.join(others)}. Give another {option}, or move the file away. "
            "Nothing was changed."
        )
    return report


def read_report(path: Path) -> dict[str, Any]:
    """A result file; without rows where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": []}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """A result file, whole or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(finite(report), indent=1) + "\n").encode())
