"""What `locas bench` prints: tables of ratios."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from locas.evaluate.bench_scaling import GROWTH

_Titled = tuple[str, Table]

NAMES = {
    "truncation": "read only (truncated window)",
    "locas_exact": "read + learn, window recomputed",
    "locas_exact_upper": "the same, memory in some layers",
    "locas_exact_lean": "the same, all layers, FFNs recomputed in the backward pass",
    "locas_exact_full": "the same, all layers, full gradient through attention",
    "locas_reuse": "read + learn, context kept",
    "locas_reuse_upper": "the same, memory in some layers",
    "locas_reuse_short": "the same, all layers, chunks a quarter as long (as memorize)",
    "templora": "TempLoRA as published (PEFT)",
}


def heading(result: dict[str, Any]) -> str:
    """What was measured on, and with which settings."""
    backbone, settings = result["backbone"], result["settings"]
    return (
        f"{backbone['name']} ({backbone['dtype']}) on {result['device']}: window {settings['window']:,}, "
        f"chunk {settings['chunk']:,}, rank {settings['rank']}"
    )


def tables(result: dict[str, Any]) -> list[_Titled]:
    """What was measured, as tables with their titles."""
    found: list[_Titled] = []
    if "relative_time" in result or "relative_memory" in result:
        found.append(_methods(result))
    if "generating" in result:
        found.append(_generating(result["generating"]))
    return found + [_scaling(part, result[part]) for part in GROWTH if part in result]


def _methods(result: dict[str, Any]) -> _Titled:
    table = _table("", "time", "quartiles", "tokens/s", "memory", "peak MiB")
    times, memory = result.get("relative_time", {}), result.get("relative_memory", {})
    for method in times or memory:
        cells = [""] * 5
        if method in times:
            low, high = result["quartiles"][method]
            cells[:3] = f"{times[method]:.2f}x", f"{low:.2f}-{high:.2f}", f"{result['tokens_per_second'][method]:,.0f}"
        if method in memory:
            cells[3:] = f"{memory[method]:.2f}x", f"{result['peak_bytes'][method] / 2**20:,.0f}"
        table.add_row(NAMES[method], *cells)
    return "reading, and learning, relative to reading only", table


def _generating(result: dict[str, Any]) -> _Titled:
    table = _table("", "median", "quartiles")
    for name, rows in result["rows"].items():
        low, high = result[name]["quartiles"]
        what = "1 row, 1 memory" if rows == 1 else f"{rows} rows, {rows} different memories"
        table.add_row(what, f"{100 * result[name]['extra_time']:+.1f}%", f"{100 * low:+.1f}% - {100 * high:+.1f}%")
    return "extra time of a generated token with memory", table


def _scaling(part: str, figures: dict[str, Any]) -> _Titled:
    title, unit = GROWTH[part]
    table = _table(unit, "time", "quartiles", *(["throughput"] if part == "documents" else []))
    for name, its in figures.items():
        low, high = its["quartiles"]
        more = [f"{its['throughput']:.2f}x"] if "throughput" in its else []
        digits = 3 if part.startswith("length") else 2  # a hundredth matters there
        shown = f"{int(name):,}" if name.isdecimal() else NAMES[name]
        table.add_row(shown, f"{its['ratio']:.{digits}f}x", f"{low:.{digits}f}-{high:.{digits}f}", *more)
    return title, table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


__all__ = ["NAMES", "heading", "tables"]
