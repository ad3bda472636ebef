"""The picture of a benchmark: each method's time relative to truncated reading, a panel for each backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from locas.evaluate.charts import altair

_LABELS = {
    "truncation": "read only",
    "locas_exact": "Locas, exact window",
    "locas_exact_upper": "Locas, exact, upper layers",
    "locas_reuse": "Locas, context kept",
    "locas_reuse_upper": "Locas, context kept, upper layers",
    "templora": "TempLoRA",
}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Writes the picture. Raises ModuleNotFoundError, saying how to install it, without the plotting library."""
    alt = altair()
    rows = [
        {
            "backbone": run["backbone"]["name"],
            "method": _LABELS[method],
            "ratio": ratio,
            "low": run["quartiles"][method][0],
            "high": run["quartiles"][method][1],
            "text": f"{ratio:.2f}x",
        }
        for run in runs
        for method, ratio in run["relative_time"].items()
    ]
    if not rows:
        return
    order = [label for label in _LABELS.values() if any(row["method"] == label for row in rows)]
    y = alt.Y("method:N", sort=order, title=None, axis=alt.Axis(labelLimit=240))
    grey, blue, red = '"#8a8f98"', '"#0b6fb8"', '"#d1495b"'
    shade = f"datum.method == 'read only' ? {grey} : datum.method == 'TempLoRA' ? {red} : {blue}"
    colour = alt.Color("shade:N", scale=None, legend=None)
    base = alt.Chart(alt.Data(values=rows)).transform_calculate(shade=shade)
    bars = base.mark_bar(height=16).encode(y=y, x=alt.X("ratio:Q", title="time, read only = 1"), color=colour)
    spread = base.mark_rule(strokeWidth=2, color="#222").encode(y=y, x="low:Q", x2="high:Q")
    text = base.mark_text(align="left", dx=8).encode(y=y, x="high:Q", text="text:N")
    panel = (bars + spread + text).properties(width=480, height=26 * len(order))
    chart = panel.facet(row=alt.Row("backbone:N", title=None)) if len(runs) > 1 else panel
    title = alt.Title(
        "What it costs to read and learn", subtitle=[f"{runs[0]['device']}; bars: medians, lines: quartiles"]
    )
    chart.properties(title=title).save(str(path), scale_factor=2)
