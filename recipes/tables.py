"""Write docs/results.md from the result files: `python recipes/tables.py`. Nothing in it is typed by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
Row = dict[str, Any]


def main() -> int:
    """Writes the page; says which result files are missing."""
    parts = ["# Results\nGenerated from `results/*.json` by `python recipes/tables.py`.\n"]
    for name, section in (("dev_books", books), ("sweep", sweep), ("kill_resume", kills)):
        paths = sorted(RESULTS.glob(f"{name}*.json"))
        for path in paths:
            report = json.loads(path.read_text())
            parts.append(section(report) + provenance(path, report))
        if not paths:
            print(f"{RESULTS / name}.json is missing", file=sys.stderr)
    (ROOT / "docs" / "results.md").write_text("\n".join(parts))
    return 0


def provenance(path: Path, report: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"\n`{path.relative_to(ROOT)}`: commit {report['commit'][:12]}, {report['device']}, {versions}.\n"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def baselines(report: Row) -> dict[tuple[Any, ...], Row]:
    """Truncated reading, by book, number of tokens and window sizes."""
    return {place(row): row for row in report["results"] if row["settings"]["init"] is None}


def place(row: Row) -> tuple[Any, ...]:
    read = row["settings"]["read"]
    return row["book"], row["tokens"], read["window"], read["chunk"], read["start_in_every_window"]


def change(row: Row, plain: Row) -> float:
    """Relative change of perplexity, in per cent."""
    return 100 * (math.exp((row["nll"] - plain["nll"]) / row["tokens"]) - 1)


def bits(row: Row) -> float:
    return row["nll"] / math.log(2) / row["bytes"]


def books(report: Row) -> str:
    """Development books: perplexity and bits per byte, with memory and without, a table for each setting."""
    plain = baselines(report)
    tables = []
    settings: dict[tuple[str, bool], list[Row]] = {}
    for row in report["results"]:
        if row["settings"]["init"] is not None and place(row) in plain:
            settings.setdefault((row["settings"]["name"], row["whole"]), []).append(row)
    for (name, whole), rows in settings.items():
        lines = []
        for row in sorted(rows, key=lambda r: r["book"].zfill(9)):
            base = plain[place(row)]
            ppl = [math.exp(r["nll"] / r["tokens"]) for r in (base, row)]
            lines.append(
                [
                    row["book"],
                    f"{row['tokens']:,}",
                    *(f"{p:.2f}" for p in ppl),
                    f"{change(row, base):+.1f}%",
                    *(f"{bits(r):.4f}" for r in (base, row)),
                ]
            )
        changes = [change(r, plain[place(r)]) for r in rows]
        better = sum(c < 0 for c in changes)
        init = rows[0]["settings"]["init"]
        what = "whole books" if whole else f"their first {max(r['tokens'] for r in rows):,} tokens"
        tables.append(
            f"### {name}: rank {init['rank']}, {rows[0]['parameters']:,} parameters; {what}\n"
            f"Below truncated reading on {better} of {len(rows)} books; "
            f"mean change {sum(changes) / len(changes):+.1f}%.\n\n"
            + markdown(
                ["book", "tokens", "perplexity without", "with", "change", "bits per byte without", "with"], lines
            )
        )
    return "## Development books, read online (every token scored before it is learnt)\n" + "\n".join(tables)


def sweep(report: Row) -> str:
    """The grids on which the defaults were chosen: change of perplexity against truncated reading."""
    plain = baselines(report)
    names: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in report["results"]:
        if row["settings"]["init"] is not None and place(row) in plain:
            key = (row["grid"], row["tokens"], row["settings"]["name"])
            names.setdefault(key, {})[row["book"]] = change(row, plain[place(row)])
    columns = sorted({book for changes in names.values() for book in changes})
    lines = [
        [f"{grid}: {name}", f"{tokens:,}", *(f"{c[b]:+.1f}%" if b in c else "" for b in columns)]
        for (grid, tokens, name), c in names.items()
    ]
    return "## Choosing the settings\n" + markdown(["setting", "tokens", *columns], lines)


def kills(report: Row) -> str:
    """SIGKILLs and resumptions."""
    phases = ", ".join(f"{n} {phase}" for phase, n in report["kills_in_phase"].items())
    return (
        f"## Killed and resumed, seed {report['seeds'][0]}\n"
        f"{report['kills']} SIGKILLs ({phases}) over {report['runs_completed']} runs; {report['identical']} of "
        f"{report['runs_completed']} final memories byte-identical to the undisturbed run's; "
        f"{report['files_checked']} memory and state files read after kills, all readable.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
