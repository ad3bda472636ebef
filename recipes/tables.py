"""Write docs/results.md and the README's tables from the result files: `python recipes/tables.py`.

Nothing on that page is typed by hand, nor between the README's marks, `<!-- results/NAME.json -->` to `<!-- end -->`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import compose_books
import compress
import dialogue
import forgetting
from markdown_table import markdown
from speed_tables import at_a_glance, bench, speed_in_brief
from sweep import baseline, baselines

import locas
from locas import InitSettings
from locas.backbone import DEFAULT_BACKBONE, built_in
from locas.evaluate.provenance import weights_sha256
from locas.evaluate.statistics import paired_bootstrap
from locas.store import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
BACKBONES = ROOT / "src" / "locas" / "backbones"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- results/(\S+\.json) -->\n).*?(<!-- end -->)", re.S)
RANK, STRENGTH = InitSettings().rank, 0.75
LIKE_FOR_LIKE = "locas-recomputed"  # ours in the windows and chunks that the baselines read
Row = dict[str, Any]


def main() -> int:
    """Writes the page and the README's tables; neither, where one of them fails."""
    made = {PAGE: page(), README: with_tables(README.read_text(encoding="utf-8"))}
    for path, text in made.items():
        write_atomically(path, text.encode())
    return 0


def page() -> str:
    """docs/results.md; says on standard error which result files are missing."""
    parts = [backbones()]
    carried = {
        weights_sha256(locas.load_backbone(name, dtype=dtype, device="cpu").model)
        for name in built_in()
        for dtype in ("float32", "bfloat16")
    }
    sections = (
        ("books", headline),
        ("dev_books", books),
        ("tune_baselines", tuned),
        ("sweep", sweep),
        ("ablations", ablations),
        ("forgetting", forgetting.table),
        ("dialogue", dialogue.table),
        ("compose_books", compose_books.table),
        ("compress", compress.table),
        ("bench", bench),
        ("kill_resume", kills),
    )
    for name, section in sections:
        paths = sorted(RESULTS.glob(f"{name}*.json"), key=lambda path: ("whole" not in path.stem, path.stem))
        if section is bench:
            parts.append(at_a_glance([json.loads(path.read_text()) for path in paths]))
        for path in paths:
            report = json.loads(path.read_text(encoding="utf-8"))
            parts.append(section(report) + provenance(path, report, carried))
        if not paths:
            print(f"{RESULTS / name}.json is missing", file=sys.stderr)
    head = "# Results\nGenerated from `results/*.json` by `python recipes/tables.py`.\n"
    return "\n".join([head, contents(parts), *parts])


def with_tables(text: str) -> str:
    """The text with what stands between its marks made anew from the file that each mark names."""

    def table(mark: re.Match[str]) -> str:
        report = json.loads((RESULTS / mark[2]).read_text(encoding="utf-8"))
        kinds = {
            "comparisons": dialogues_in_brief,
            "at_equal_gain": forgetting_in_brief,
            "relative_time": speed_in_brief,
        }
        return mark[1] + next((of for key, of in kinds.items() if key in report), brief)(report) + mark[3]

    return MARKED.sub(table, text)


def brief(report: Row) -> str:
    """Test books in one table: each method's loss, its distance from truncated reading, ours from it, and its cost.

    Losses are over all tokens of all books, so that long books count more; distances are means over books, which is
    why they are not the losses' differences.
    """
    apart = {(p["method"], p["minus"]): p for p in report["paired"]}

    def distance(method: str, minus: str, sign: int) -> str:
        if (method, minus) not in apart:
            return ""
        p = apart[method, minus]
        low, high = sorted(sign * p[end] for end in ("low", "high"))
        better = p["better_on"] if sign == 1 else p["books"] - p["better_on"]
        return f"{sign * p['mean']:+.3f} [{low:+.3f}, {high:+.3f}], {better} of {p['books']}"

    lines = [
        [
            f"`{name}`",
            f"{m['perplexity']:.1f}",
            f"{m['bits_per_byte']:.3f}",
            distance(name, "truncation", 1),
            distance(name, "locas", -1),
            distance(name, LIKE_FOR_LIKE, -1),
            f"{m['parameters']:,}",
            _cost(m, "relative_time", 1),
            _cost(m, "relative_memory", 1),
        ]
        for name, m in report["methods"].items()
    ]
    header = [
        "perplexity of all tokens",
        "bits per byte of all tokens",
        "minus truncation's, mean over books",
        "Locas's minus its, mean over books",
        f"`{LIKE_FOR_LIKE}`'s minus its, mean over books",
        "parameters",
        "time, mean over books",
        "memory, mean over books",
    ]
    return markdown([extent(report), *header], lines)


def _cost(method: Row, key: str, digits: int) -> str:
    """A ratio to truncated reading. Marked where that is reading as it was at an earlier commit; of memory then none,
    as what reading itself held was changed in between."""
    value, before = method[key], bool(method.get("cost_of_before"))
    if value is None or (before and key == "relative_memory"):
        return ""
    return f"{value:.{digits}f}" + ("*" if before else "")


def dialogues_in_brief(report: Row) -> str:
    """One point of a list: what the gold answers' log-likelihood and F1 gain, beside no memory, TempLoRA and BM25."""
    of = {(c["from"], c["to"], c["figure"]): c for c in report["comparisons"]}

    def apart(one: str, other: str, figure: str = "gold_ll_per_token") -> str:
        turned = (one, other, figure) not in of
        sign, c = (-1, of[other, one, figure]) if turned else (1, of[one, other, figure])
        times = 100 * sign if figure == "f1" else sign
        low, high = sorted(times * c[end] for end in ("low", "high"))
        return f"{times * c['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"

    asked = report["settings"]["ask"]["max_questions"]
    return point(
        f"Questions about long conversations (LoCoMo, {len(report['conversations'])} of them, "
        f"{f'{asked} questions each' if asked else 'all questions'}), nothing of the conversation in the context: the "
        f"gold answer's log-likelihood, nats a token, beside no memory {apart('none', 'locas')}, beside TempLoRA "
        f"{apart('templora-tuned', 'locas')}; with BM25's passages, beside these alone {apart('bm25', 'locas+bm25')}. "
        f"F1 of what is generated, in points: beside TempLoRA {apart('templora-tuned', 'locas', 'f1')}, with BM25's "
        f"passages beside these alone {apart('bm25', 'locas+bm25', 'f1')}."
    )


def forgetting_in_brief(report: Row) -> str:
    """One point of a list: KL elsewhere at equal gain, ours over TempLoRA's, and MMLU."""
    books_ = sorted({(row["book"], row["tokens"]) for row in report["rows"]})
    parts = []
    for pair in sorted(report["at_equal_gain"], key=lambda pair: pair["method"]):
        if pair["method"].startswith("locas") and pair["against"].startswith("templora") and pair["at"]:
            first, *_, last = [x["ratio"] for x in pair["at"]]
            parts.append(f"{first:.2f} and {last:.2f} with `{pair['method']}`")
    text = (
        f"What it costs elsewhere, after {max(n for _, n in books_):,} tokens of "
        f"{'one test book' if len(books_) == 1 else f'each of {len(books_)} test books'}: KL on other books, in units "
        f"of TempLoRA's, at a fifth and at all of the gain on the book's later text that both reach: {', '.join(parts)}"
    )
    if report["mmlu"]:
        changes = [x - report["mmlu"]["accuracy"] for label, x in report["mmlu"]["after"].items() if "locas" in label]
        asked = max(report["mmlu"]["books"].values())
        on = "" if asked == len(books_) else f", asked after {asked} of them,"
        text += (
            f"; MMLU{on} changes by {100 * max(changes, key=abs):+.1f} points at most (standard error "
            f"{100 * report['mmlu']['standard_error']:.1f})"
        )
    return point(f"{text}. With nothing attached, the backbone is the same to the last bit.") + _strength(
        report["points"]
    )


def _strength(points: list[Row]) -> str:
    """One more: what is left, of the default memory's gain and of its change elsewhere, at less strength."""
    mine = {p["scale"]: p for p in points if (p["method"], p["rank"], p["lr_factor"]) == ("locas", RANK, 1.0)}
    if not {STRENGTH, 1.0} <= mine.keys():
        return ""
    less, whole = mine[STRENGTH], mine[1.0]
    return point(
        f"How strongly a memory acts is a dial. At full strength `locas` gains {whole['gain']:.3f} nats a token on the "
        f"book's later text, and other books take {whole['bits_per_byte_change']:+.3f} bits per byte (KL "
        f"{whole['kl']:.3f} nats a token); at `--strength {STRENGTH:g}` {100 * less['gain'] / whole['gain']:.0f}% of "
        f"the gain is left, and other books take {less['bits_per_byte_change']:+.3f} (KL {less['kl']:.3f})."
    )


def point(text: str) -> str:
    """A point of a Markdown list, in lines of 120."""
    return textwrap.fill(text, 120, initial_indent="* ", subsequent_indent="  ", break_on_hyphens=False) + "\n"


def extent(report: Row) -> str:
    """How much of which books, e.g. "24 books, the first 12,288 tokens of each"."""
    tokens = [b["tokens"] for b in report["books"]]
    cut = tokens.count(max(tokens)) > 1  # no two whole books have the same length
    part = f"the first {max(tokens):,} tokens of each" if cut else f"whole: {sum(tokens):,} tokens"
    return f"{len(report['books'])} books, {part}"


def contents(parts: list[str]) -> str:
    """Links to the sections, as GitHub names them, with the file that each is made from."""
    lines: list[str] = []
    seen: Counter[str] = Counter()
    for part in parts:
        title = part.split("\n", 1)[0].removeprefix("## ")
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = f"-{seen[anchor]}" if seen[anchor] else ""
        seen[anchor] += 1
        file = re.search(r"^`(results/[^`]+)`", part, re.M)
        lines.append(f"* [{title}](#{anchor}{number})" + (f" ({file[1]})" if file else ""))
    return "\n".join(lines) + "\n"


def backbones() -> str:
    """Bits per byte of development books, read without memory: the built-in backbones and the one before them."""
    found = {
        name: json.loads((BACKBONES / name / "evaluation.json").read_text(encoding="utf-8")) for name in built_in()
    }
    found["before"] = json.loads((RESULTS / "backbone_before.json").read_text(encoding="utf-8"))
    columns = [(name, form) for name in found for form in ("wrapped", "reflowed")]
    cells = {(r["book"], n, r["form"]): r["bits_per_byte"] for n, report in found.items() for r in report["books"]}
    books_ = sorted({book for book, _, _ in cells}, key=lambda book: book.zfill(9))
    lines = [[book, *(f"{cells[book, *column]:.3f}" for column in columns)] for book in books_]
    means = {(n, form): bits_ for n, report in found.items() for form, bits_ in report["mean_bits_per_byte"].items()}
    lines.append(["mean", *(f"{means[column]:.3f}" for column in columns)])
    first = found[DEFAULT_BACKBONE]
    part = f"the first {first['max_tokens']:,} tokens of each" if first["max_tokens"] else "whole"
    sizes = ", ".join(f"{name} {report['window']:,}/{report['chunk']:,}" for name, report in found.items())
    return (
        f"## The built-in backbones\nBits per byte of the development books, {part}, read without memory, with the "
        f"hard wraps of the files and re-flowed. `before` is the stopgap that the package carried first. Window and "
        f"chunk: {sizes}.\n\n"
    ) + markdown(["book", *(f"{name}, {form}" for name, form in columns)], lines)


def provenance(path: Path, report: Row, carried: set[str]) -> str:
    """Where a table comes from; and whether its backbone is one that the package carries today."""
    backbone = report.get("backbone", {})
    recorded = backbone.get("weights_sha256")
    if recorded is None and "backbone" in report.get("settings", {}):
        backbone = {"name": report["settings"]["backbone"]}
    name = backbone.get("name", "")
    if name in built_in() and recorded not in carried:
        name += " as it was before (7M parameters, context of 512: the stopgap)"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rows = [row.get("commit") for row in report.get("results", [])]
    noted = report.get("measured_at_commits") or sorted({commit for commit in rows if commit})
    others = [c[:7] for c in noted if c != report["commit"]]
    others += [f"of {rows.count(None)} rows it is not noted"] if noted and None in rows else []
    commit = report["commit"][:12] + (f" (parts of it: {', '.join(others)})" if others else "")
    if "memory_measured" in report:  # see `locas.evaluate.books_figures.with_memory_of`
        of = report["memory_measured"]
        commit += f", memory of {', '.join(of['methods'])} on the first {of['tokens']:,} tokens at {of['commit'][:12]}"
    return f"\n`{path.relative_to(ROOT)}`: commit {commit}, {report['device']}, {versions}" + (
        f", backbone {name}.\n" if name else ".\n"
    )


def change(row: Row, plain: Row) -> float:
    """Relative change of perplexity, in per cent."""
    return 100 * (math.exp((row["nll"] - plain["nll"]) / row["tokens"]) - 1)


def bits(row: Row) -> float:
    return row["nll"] / math.log(2) / row["bytes"]


def books(report: Row) -> str:
    """Development books: perplexity and bits per byte, with memory and without, a table for each setting."""
    plain = baselines(report["results"])
    tables = []
    settings: dict[tuple[str, bool], list[tuple[Row, Row]]] = {}
    for row in report["results"]:
        if row["settings"]["init"] is not None and (base := baseline(row, plain)) is not None:
            settings.setdefault((row["settings"]["name"], row["whole"]), []).append((row, base))
    for (name, whole), pairs in settings.items():
        rows, lines = [row for row, _ in pairs], []
        for row, base in sorted(pairs, key=lambda pair: pair[0]["book"].zfill(9)):
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
        changes = [change(row, base) for row, base in pairs]
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
    tables.append(against_default([row for pairs in settings.values() for row, _ in pairs]))
    return "## Development books, read online (every token scored before it is learnt)\n" + "\n".join(tables)


def against_default(rows: list[Row]) -> str:
    """What other settings do to the loss of reading with the default ones, book by book."""
    default = {(row["book"], row["tokens"]): row["nll"] for row in rows if row["settings"]["name"] == "default"}
    changes: dict[str, dict[str, float]] = {}
    for row in rows:
        name, at = row["settings"]["name"], (row["book"], row["tokens"])
        if name != "default" and at in default:
            changes.setdefault(name, {})[row["book"]] = 100 * (row["nll"] / default[at] - 1)
    if not changes:
        return ""
    books_ = sorted({book for found in changes.values() for book in found}, key=lambda book: book.zfill(9))
    lines = [
        [
            name,
            f"{sum(found.values()) / len(found):+.2f}%",
            *(f"{found[b]:+.2f}%" if b in found else "" for b in books_),
        ]
        for name, found in changes.items()
    ]
    return "### Change of the loss against the default settings\n\n" + markdown(["setting", "mean", *books_], lines)


def sweep(report: Row) -> str:
    """The grids on which the defaults were chosen: change of perplexity against truncated reading."""
    plain = baselines(report["results"])
    names: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in report["results"]:
        if row["settings"]["init"] is not None and (base := baseline(row, plain)) is not None:
            key = (row["grid"], row["tokens"], row["settings"]["name"])
            names.setdefault(key, {})[row["book"]] = change(row, base)
    columns = sorted({book for changes in names.values() for book in changes})
    lines = [
        [f"{grid}: {name}", f"{tokens:,}", f"{statistics.mean(c.values()):+.2f}%"]
        + [f"{c[b]:+.1f}%" if b in c else "" for b in columns]
        for (grid, tokens, name), c in names.items()
    ]
    grids = ", ".join(dict.fromkeys(grid for grid, _, _ in names))
    return (
        f"## Choosing the settings: {grids}\nChange of perplexity against truncated reading of the same tokens, on "
        "development books by number.\n\n" + markdown(["setting", "tokens", "mean", *columns], lines)
    )


def headline(report: Row) -> str:
    """Test books: every method, what it costs, and its paired differences."""
    lines, methods = [], report["methods"]
    for name, m in methods.items():
        lines.append(
            [
                name,
                f"{m['bits_per_byte']:.4f}",
                f"{m['perplexity']:.2f}",
                f"{m['perplexity_chunk_mean']:.2f}",
                f"{m['parameters']:,}",
                _cost(m, "relative_time", 2),
                _cost(m, "relative_memory", 2),
            ]
        )
    header = ["method", "bits per byte", "perplexity", "mean of chunks'", "parameters", "time", "memory"]
    seeds = ", ".join(map(str, report["seeds"]))
    text = (
        f"## Test books: {extent(report)}\nSeeds {seeds}. Bits per byte and perplexity, exp of the mean loss, are of "
        "all books' tokens together, and so is the mean of chunks', TempLoRA's definition; paired differences are "
        "means over books. Time and memory are relative to truncated reading, in the same run, means over books; "
        "*: at an earlier commit, relative to truncated reading as it was then; of memory none is shown, as what "
        "reading itself held was changed in between.\n\n"
    )
    return text + markdown(header, lines) + "\n" + _marks(methods) + _pairs(report["paired"]) + _per_book(report)


def _marks(methods: Row) -> str:
    marks = list(dict.fromkeys(mark for m in methods.values() for mark in m["at"]))
    if not marks:
        return ""
    header = ["perplexity after", *(f"{int(m):,} ({methods['truncation']['at'][m]['books']} books)" for m in marks)]
    lines = [[name, *(f"{m['at'][k]['perplexity']:.2f}" for k in marks)] for name, m in methods.items()]
    return markdown(header, lines) + "\n"


def _pairs(pairs: list[Row]) -> str:
    lines = [
        [
            f"{p['method']} minus {p['minus']}",
            f"{p['mean']:+.4f}",
            "" if p["low"] is None else f"[{p['low']:+.4f}, {p['high']:+.4f}]",
            f"{p['better_on']} of {p['books']}",
        ]
        for p in pairs
        if p["minus"] in ("truncation", "locas") or p["method"].startswith("locas")
    ]
    header = ["bits per byte, paired, mean over books", "difference", "95% interval", "better on"]
    return markdown(header, lines) + "\n"


def _per_book(report: Row) -> str:
    methods = report["methods"]
    lines = [
        [b["name"], f"{b['tokens']:,}", *(f"{m['per_book'][b['name']]['bits_per_byte']:.4f}" for m in methods.values())]
        for b in report["books"]
    ]
    return markdown(["bits per byte", "tokens", *methods], lines)


def tuned(report: Row) -> str:
    """What was tried for each baseline on development books."""
    ranked = sorted(report["means"].items(), key=lambda item: (item[1] is None, item[1] or 0.0))
    lines = [
        [m, "diverged" if mean is None else f"{mean:.4f}", "x" if m in report["chosen"].values() else ""]
        for m, mean in ranked
    ]
    settings = report["settings"]
    return (
        f"## Choosing the baselines' settings\nDevelopment books {settings['books']}, their first "
        f"{settings['max_tokens']:,} tokens. Not chosen are settings of more updates a chunk than TempLoRA's two.\n\n"
        + markdown(["setting", "bits per byte", "chosen"], lines)
    )


def ablations(report: Row) -> str:
    """Each setting's bits per byte against truncated reading, mean over books, with a bootstrap interval over books.

    Seeds of one setting are averaged book by book first.
    """
    plain = baselines(report["results"])
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in report["results"]:
        if row["settings"]["init"] is not None and (base := baseline(row, plain)) is not None:
            key = (row["grid"], row["settings"]["name"].partition(", seed ")[0])
            difference = bits(row) - bits(base)
            found.setdefault(key, {}).setdefault(row["book"], []).append(difference)
    lines = []
    for (grid, name), books_ in found.items():
        mean, low, high = paired_bootstrap([sum(v) / len(v) for v in books_.values()])
        seeds = max(len(v) for v in books_.values())
        span = "" if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]"
        lines.append([f"{grid.removeprefix('ablate-')}: {name}", f"{mean:+.4f}", span, str(len(books_)), str(seeds)])
    header = ["setting", "bits per byte against truncation", "95% interval", "books", "seeds"]
    tokens = max(row["tokens"] for row in report["results"])
    of = len({row["book"] for row in report["results"]})
    said = f"The first {tokens:,} tokens of {of} development books: so few updates show a direction, hardly its size."
    return f"## Ablations\n{said}\n\n" + markdown(header, lines)


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
