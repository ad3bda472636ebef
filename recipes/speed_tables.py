"""The results page's and the README's tables of speed, from the files that `locas bench` wrote."""

from __future__ import annotations

import re
from typing import Any

from markdown_table import markdown

from locas.cli.bench_tables import NAMES
from locas.evaluate.bench_scaling import GROWTH

Row = dict[str, Any]
FAR = "1000000"  # tokens into a text
# What arXiv:2602.05085 measured, and what this project set itself, in the columns of `at_a_glance`.
PAPER = ("the paper", "", "", "", "", "1.4-1.8", "2.6-3.1", "", "", "", "")
LIMITS = ("to be met", "1.65", "1.3", "1.25", "1.0", "", "4.5", "+3%", "+8%", "1.5", "1.02")
COLUMNS = (
    "exact",
    "exact, upper layers",
    "kept",
    "kept, upper layers",
    "full gradient",
    "TempLoRA over exact",
    "a token, 1 memory",
    "16 rows, 16 memories",
    "peak memory",
    "a million tokens on",
)


def at_a_glance(reports: list[Row]) -> str:
    """All machines, backbones and dtypes beside one another, and beside what was to be met."""
    lines = [
        [f"{device(r)}: {r['backbone']['name']}, {r['backbone']['dtype']}, {r['settings']['window']:,}", *_glance(r)]
        for r in reports
    ]
    return (
        "## Speed at a glance\n"
        "Reading and learning, over truncated reading of the same windows, each recomputed: with every window "
        "recomputed (`exact`) or the context kept (`kept`), a memory in all layers or in the upper ones, attention's "
        "weights taken for constants in a write, as `locas memorize` does; `full gradient`: `exact` with the loss's "
        "own gradient. Then what TempLoRA, which has that too, takes over `exact` (on CUDA its steps are launched "
        "kernel by kernel, as PEFT and torch do it, and ours are replayed as CUDA graphs); the "
        "extra time of a generated token with one memory of rank 64, and in a batch of 16 rows with as many memories; "
        "the peak of memory of `exact`, weights included, over that of reading; a chunk a million tokens into a text "
        "over one at its beginning. Medians; sections below have quartiles and more.\n\n"
        + markdown(["machine: backbone, dtype, window", *COLUMNS], [list(PAPER), list(LIMITS), *lines])
    )


def _glance(report: Row) -> list[str]:
    times, generating = report["relative_time"], report.get("generating", {})
    ours = ("locas_exact", "locas_exact_upper", "locas_reuse", "locas_reuse_upper", "locas_exact_full")
    far = report.get("length", {}).get(FAR)
    return [
        *(f"{times[method]:.2f}" if method in times else "" for method in ours),
        f"{times['templora'] / times['locas_exact']:.1f}" if "templora" in times else "",
        *(f"{100 * generating[rows]['extra_time']:+.1f}%" if rows in generating else "" for rows in ("one", "many")),
        f"{report['relative_memory']['locas_exact']:.2f}" if "relative_memory" in report else "",
        "" if far is None else f"{far['ratio']:.3f}",
    ]


def device(report: Row) -> str:
    """What it was measured on, without the number of threads."""
    return re.sub(", [0-9]+ threads$", "", report["device"])


def speed_in_brief(report: Row) -> str:
    """What reading, with learning or without, takes relative to reading only, and the peak of memory."""
    memory = report.get("relative_memory", {})
    lines = [
        [NAMES[method], f"{ratio:.2f} [{report['quartiles'][method][0]:.2f}, {report['quartiles'][method][1]:.2f}]"]
        + ([f"{memory[method]:.2f} ({report['peak_bytes'][method] / 2**20:,.0f} MiB)"] if memory else [])
        for method, ratio in report["relative_time"].items()
    ]
    settings, backbone = report["settings"], report["backbone"]
    what = (
        f"{backbone['name']}, {backbone['dtype']}, {device(report)}; window "
        f"{settings['window']:,}, chunk {settings['chunk']:,}, rank {settings['rank']}"
    )
    return markdown([what, "time [quartiles]", *(["memory"] if memory else [])], lines)


def bench(report: Row) -> str:
    """Time and memory relative to truncated reading, and of generating with a memory."""
    settings, parts = report["settings"], []
    memory = report.get("relative_memory", {})
    lines = []
    for method, ratio in report["relative_time"].items():
        low, high = report["quartiles"][method]
        lines.append(
            [
                method,
                f"{ratio:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{report['tokens_per_second'][method]:,.0f}",
                f"{memory[method]:.2f}" if method in memory else "",
            ]
        )
    parts.append(
        f"## Speed: {report['backbone']['name']}, {report['backbone']['dtype']}, {report['device']}\n"
        f"Window {settings['window']:,}, chunk {settings['chunk']:,}, rank {settings['rank']}; `upper`: layers "
        f"{settings['upper']}. Medians of {settings['rounds']} rounds in which every method reads the same chunk, "
        "relative to truncated reading in the same round.\n\n"
        + markdown(["method", "time", "quartiles", "tokens/s", "memory"], lines)
    )
    for name, rows in report.get("generating", {}).get("rows", {}).items():
        figures = report["generating"][name]
        low, high = figures["quartiles"]
        parts.append(
            f"Extra time of a generated token, {rows} row{'s' if rows > 1 else ''} with as many memories: "
            f"{100 * figures['extra_time']:+.1f}% (quartiles {100 * low:+.1f}% to {100 * high:+.1f}%).\n"
        )
    for part, (what, unit) in GROWTH.items():
        if part in report:
            rows = [_scaled(name, figures) for name, figures in report[part].items()]
            parallel = ["throughput"] if part == "documents" else []
            parts.append(f"Time of {what}:\n\n" + markdown([unit, "time", "quartiles", *parallel], rows))
    return "\n".join(parts)


def _scaled(name: str, figures: Row) -> list[str]:
    low, high = figures["quartiles"]
    parallel = [f"{figures['throughput']:.2f}"] if "throughput" in figures else []
    name = f"{int(name):,}" if name.isdecimal() else name
    return [name, f"{figures['ratio']:.3f}", f"{low:.3f}-{high:.3f}", *parallel]
