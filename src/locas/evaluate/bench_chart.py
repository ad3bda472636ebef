"""The picture of a benchmark: each method's time relative to truncated reading, and how it grows with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from locas.evaluate.bench_scaling import GROWTH
from locas.evaluate.charts import altair, png
from locas.store import write_atomically

_LABELS = {
    "truncation": "read only",
    "locas_exact": "Locas, exact window",
    "locas_exact_upper": "Locas, exact, upper layers",
    "locas_exact_lean": "Locas, exact, FFNs recomputed",
    "locas_exact_full": "Locas, exact, full attention gradient",
    "locas_reuse": "Locas, context kept",
    "locas_reuse_upper": "Locas, context kept, upper layers",
    "locas_reuse_short": "Locas, context kept, short chunks",
    "templora": "TempLoRA",
}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Writes the picture. Raises ModuleNotFoundError, saying how to install it, without the plotting library."""
    alt = altair()
    timed = [run for run in runs if "relative_time" in run]
    growth = [panel for part in GROWTH if (panel := _growth(alt, runs, part)) is not None]
    panels = ([_methods(alt, timed)] if timed else []) + ([alt.concat(*growth, columns=2)] if growth else [])
    if not panels:
        return
    devices = ", ".join(dict.fromkeys(run["device"] for run in runs))
    title = alt.Title("What it costs to read and learn", subtitle=[f"{devices}; medians and quartiles"])
    write_atomically(path, png(alt.vconcat(*panels, title=title).resolve_scale(color="independent")))


def _name(run: dict[str, Any]) -> str:
    """A backbone's name; with dtype and device, which may differ from run to run."""
    return f"{run['backbone']['name']}, {run['backbone']['dtype']}, {run['device'].split(',')[0]}"


def _methods(alt: Any, runs: list[dict[str, Any]]) -> Any:
    """Bars: each method's time relative to truncated reading, a panel for each backbone."""
    rows = [
        {
            "backbone": _name(run),
            "method": _LABELS[method],
            "ratio": ratio,
            "low": run["quartiles"][method][0],
            "high": run["quartiles"][method][1],
            "text": f"{ratio:.2f}x",
        }
        for run in runs
        for method, ratio in run["relative_time"].items()
    ]
    order = [label for label in _LABELS.values() if any(row["method"] == label for row in rows)]
    y = alt.Y("method:N", sort=order, title=None, axis=alt.Axis(labelLimit=240))
    grey, blue, red = '"#8a8f98"', '"#0b6fb8"', '"#d1495b"'
    shade = f"datum.method == 'read only' ? {grey} : datum.method == 'TempLoRA' ? {red} : {blue}"
    colour = alt.Color("shade:N", scale=None, legend=None)
    base = alt.Chart(alt.Data(values=rows)).transform_calculate(shade=shade)
    # Room for the number behind the longest bar.
    scale = alt.Scale(domain=[0, 1.12 * max(row["high"] for row in rows)], nice=False)
    bars = base.mark_bar(height=16).encode(
        y=y, x=alt.X("ratio:Q", title="time, read only = 1", scale=scale), color=colour
    )
    spread = base.mark_rule(strokeWidth=2, color="#222").encode(y=y, x="low:Q", x2="high:Q")
    text = base.mark_text(align="left", dx=8).encode(y=y, x="high:Q", text="text:N")
    panel = (bars + spread + text).properties(width=480, height=26 * len(order))
    header = alt.Header(labelAngle=0, labelOrient="top", labelAnchor="start", labelFontWeight="bold")
    return panel.facet(row=alt.Row("backbone:N", title=None, sort=None, header=header)) if len(runs) > 1 else panel


def _growth(alt: Any, runs: list[dict[str, Any]], part: str) -> Any:
    """A line for each backbone over what grows, with the quartiles; of documents the throughput."""
    rows = [
        {
            "backbone": _name(run),
            "n": int(n),
            "y": its["ratio"],
            "low": its["quartiles"][0],
            "high": its["quartiles"][1],
        }
        for run in runs
        for n, its in run.get(part, {}).items()
        if n.isdecimal()
    ]
    if not rows:
        return None
    if part == "documents":
        rows = [
            row | {"y": row["n"] / row["y"], "low": row["n"] / row["high"], "high": row["n"] / row["low"]}
            for row in rows
        ]
    title, axis = GROWTH[part]
    if part == "documents":
        title = f"throughput of {title}"
    ticks = sorted({row["n"] for row in rows})
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("n:Q", title=axis, scale=alt.Scale(type="log", nice=False), axis=alt.Axis(values=ticks, format="~s")),
        color=alt.Color("backbone:N", title=None, sort=None, legend=alt.Legend(orient="bottom", labelLimit=400)),
    )
    line = base.mark_line(point=True).encode(y=alt.Y("y:Q", title=None))
    spread = base.mark_rule(opacity=0.5).encode(y="low:Q", y2="high:Q")
    return (line + spread).properties(title=alt.Title(title, anchor="start", fontSize=12), width=340, height=140)
