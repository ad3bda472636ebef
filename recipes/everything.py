"""Every evaluation, one after another, and the results page: one command, to be stopped and gone on with at any time.

    python recipes/everything.py DATA              # days on one CPU core; each part goes on where it stopped
    python recipes/everything.py DATA --brief      # the same on the books' beginnings: hours
    python recipes/everything.py DATA --list       # the commands, without running them
    python recipes/everything.py DATA --only tune-baselines,books,tables

DATA holds `books/dev/*.txt` and `books/test/*.txt` (PG-19), `locomo/dev.json` and `locomo/test.json`, and `mmlu/` (CSV
files, see docs/dialogue-and-forgetting.md). Settings are chosen on development data, by the parts that come first; what
is reported is read from the test data. Per-token losses, pages and pictures go to `runs/`, figures to `results/`. A
part whose result file is of another backbone, or of another version of locas or torch, stops and says so: move the file
away to measure anew.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Part:
    """One recipe.

    Attributes:
        name: for `--only`.
        what: what it shows.
        command: the recipe and its arguments.
        brief: arguments that `--brief` adds.
        needs: paths in DATA.
    """

    name: str
    what: str
    command: tuple[str, ...]
    brief: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def parts(data: Path) -> tuple[Part, ...]:
    """All of them, in their order."""
    dev, test, locomo = str(data / "books/dev"), str(data / "books/test"), data / "locomo"
    beginnings = ("--skip-tokens", "4096", "--read-tokens", "8192", "--later-tokens", "4096")
    return (
        Part(
            "tune-baselines",
            "learning rates and steps of the baselines, development books",
            ("tune_baselines.py", dev, "-o", "runs/tune"),
            ("--max-tokens", "8192", "--results", "runs/tune/brief.json"),
            ("books/dev",),
        ),
        Part(
            "books",
            "the headline: every method on every test book",
            ("books.py", test, "-o", "runs/books"),
            ("--max-tokens", "8192", "--tuned", "runs/tune/brief.json"),
            ("books/test",),
        ),
        Part(
            "ablations",
            "initialisation, rank, learning rate, chunk, steps, layers, clipping, tau, window",
            ("sweep.py", dev, "--ablations", "-o", "results/ablations.json"),
            ("--max-tokens", "8192", "--books", "5962,26239"),
            ("books/dev",),
        ),
        Part(
            "forgetting-dev",
            "gain against change elsewhere, development books",
            ("forgetting.py", "dev", dev),
            ("--max-tokens", "8192"),
            ("books/dev",),
        ),
        Part(
            "forgetting",
            "gain against change elsewhere, MMLU before and after",
            ("forgetting.py", "test", test, "--mmlu", str(data / "mmlu")),
            ("--max-tokens", "8192", "--mmlu-limit", "20"),
            ("books/test", "mmlu"),
        ),
        Part(
            "dialogue-dev",
            "questions about conversations: settings",
            ("dialogue.py", "dev", str(locomo / "dev.json")),
            ("--max-questions", "50"),
            ("locomo/dev.json",),
        ),
        Part(
            "dialogue",
            "questions about conversations",
            ("dialogue.py", "test", str(locomo / "test.json")),
            ("--max-questions", "50"),
            ("locomo/test.json",),
        ),
        Part(
            "compose",
            "what composing two books costs each",
            ("compose_books.py", dev, *beginnings),
            ("--read-tokens", "4096", "--later-tokens", "2048"),
            ("books/dev",),
        ),
        Part(
            "compress",
            "what survives at half and a quarter of the rank",
            ("compress.py", dev, "--books", "5962,26239,27454,53345", *beginnings),
            ("--read-tokens", "4096", "--later-tokens", "2048"),
            ("books/dev",),
        ),
        Part("tables", "docs/results.md from the result files", ("tables.py",)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the evaluation data")
    parser.add_argument("--brief", action="store_true", help="on less text")
    parser.add_argument("--list", action="store_true", help="print the commands, and stop")
    parser.add_argument("--only", help="names of parts, with commas between")
    args = parser.parse_args(arguments)
    chosen = choose(parts(args.data.resolve()), args.only)
    commands = [(part, [sys.executable, str(HERE / part.command[0]), *part.command[1:]]) for part in chosen]
    if args.brief:
        commands = [(part, command + list(part.brief)) for part, command in commands]
    if args.list:
        for part, command in commands:
            print(f"# {part.name}: {part.what}\n{shlex.join(command)}")
        return 0
    missing = sorted({need for part in chosen for need in part.needs if not (args.data / need).exists()})
    if missing:
        parser.error(f"{args.data} lacks {', '.join(missing)}; --only takes the parts that need none of it")
    for number, (part, command) in enumerate(commands, start=1):
        print(f"[{number}/{len(commands)}] {part.name}: {part.what}", file=sys.stderr, flush=True)
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            print(f"{part.name} ended with {code}; the same command goes on from there", file=sys.stderr)
            return code
        print(f"{part.name}: {(time.monotonic() - began) / 60:.1f} minutes", file=sys.stderr)
    return 0


def choose(every: tuple[Part, ...], only: str | None) -> list[Part]:
    """The named ones, in their own order.

    Raises:
        SystemExit: a name that there is not.
    """
    names = [part.name for part in every]
    wanted = only.split(",") if only else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise SystemExit(f"there is no part {', '.join(unknown)}; there are {', '.join(names)}")
    return [part for part in every if part.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
