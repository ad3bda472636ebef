"""Peaks of memory for long readings, from those of the same books' beginnings: they do not depend on how far one reads.

    python recipes/books_memory.py results/books_12k.json results/books_50k.json results/books_whole.json

The first file is the one with the beginnings; the others are written anew, and say so (`memory_measured`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from locas.evaluate.books_figures import with_memory_of
from locas.store import write_atomically


def main() -> int:
    """Writes the files that the arguments name; none, where one of them does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beginnings", type=Path, help="results of the books' beginnings")
    parser.add_argument("results", type=Path, nargs="+", help="results of the same books, read further")
    args = parser.parse_args()
    beginnings = json.loads(args.beginnings.read_text())
    made = {path: with_memory_of(json.loads(path.read_text()), beginnings) for path in args.results}
    for path, found in made.items():
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
