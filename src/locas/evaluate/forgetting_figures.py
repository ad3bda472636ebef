"""The frontier of gain against change: means over books, methods compared at equal gain, and its picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locas.evaluate.cells import finite
from locas.evaluate.charts import altair, png
from locas.evaluate.statistics import paired_bootstrap
from locas.store import write_atomically

Row = dict[str, Any]
GAINS_COMPARED = 5  # at so many gains, evenly spread over what two methods have in common


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """What `locas.evaluate.forgetting.run` returned, over books.

    Returns:
        points: for each configuration and scale, means over books of gain, kl and bits_per_byte_change with bootstrap
        intervals, parameters, seconds; at_equal_gain: see `equal_gain`, for each pair of methods, their ranks and step
        sizes taken together; mmlu: accuracy before, and after learning, by configuration; failed.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["label"], row["scale"]), []).append(row)
    books = {row["book"] for row in result["rows"]} | {row["book"] for row in result["failed"]}
    points = [_point(rows) for rows in groups.values()]
    whole = [p for p in points if p["books"] == len(books)]  # the others would be means over easier books
    pairs = []
    for one, other in itertools.combinations(dict.fromkeys(p["method"] for p in whole), 2):
        found = equal_gain([p for p in whole if p["method"] == one], [p for p in whole if p["method"] == other])
        pairs.append({"method": one, "against": other, "at": found})
    return {
        "points": points,
        "at_equal_gain": pairs,
        "mmlu": _mmlu(result),
        "failed": result["failed"],
        "bit_exact": bool(result["rows"]) and all(row["bit_exact"] for row in result["rows"]),
    }


def _point(rows: Sequence[Row]) -> Row:
    first = rows[0]
    point = {key: first[key] for key in ("label", "method", "rank", "lr_factor", "scale", "parameters")}
    point |= {"books": len(rows), "seconds": round(sum(r["seconds"] for r in rows), 2)}
    for name in ("gain", "kl", "bits_per_byte_change"):
        known = [row[name] for row in rows if row[name] is not None]
        if known:
            mean = paired_bootstrap(known)
            point |= {name: mean.mean, f"{name}_low": mean.low, f"{name}_high": mean.high}
        else:
            point |= {name: None, f"{name}_low": None, f"{name}_high": None}
    return point


def frontier(points: Sequence[Row]) -> list[tuple[float, float]]:
    """(gain, KL) of the points that no other beats in both, by rising gain."""
    known = [(p["gain"], p["kl"]) for p in points if p["gain"] is not None and p["kl"] is not None]
    best: list[tuple[float, float]] = []
    for gain, kl in sorted(known, key=lambda x: (-x[0], x[1])):
        if not best or kl < best[-1][1]:
            best.append((gain, kl))
    return best[::-1]


def equal_gain(ours: Sequence[Row], theirs: Sequence[Row]) -> list[dict[str, float]]:
    """KL of two methods' frontiers at gains that both reach.

    Between two points of a frontier the root of KL is taken to be linear in the gain: KL grows with the square of a
    small change, gain with the change. Nothing is extrapolated.

    Returns:
        gain, kl, kl_against, ratio (kl / kl_against) at `GAINS_COMPARED` gains; nothing where the two do not overlap.
    """
    one, other = frontier(ours), frontier(theirs)
    if not one or not other:
        return []
    low, high = max(one[0][0], other[0][0]), min(one[-1][0], other[-1][0])
    if low > high:
        return []
    steps = 1 if low == high else GAINS_COMPARED
    found = []
    for i in range(steps):
        gain = low + (high - low) * i / max(1, steps - 1)
        kl, against = _kl_at(one, gain), _kl_at(other, gain)
        found.append({"gain": gain, "kl": kl, "kl_against": against, "ratio": kl / against if against else math.inf})
    return found


def _kl_at(front: Sequence[tuple[float, float]], gain: float) -> float:
    if len(front) == 1:
        return front[0][1]
    for (g0, k0), (g1, k1) in itertools.pairwise(front):
        if gain <= g1 or (g1, k1) == front[-1]:
            part = min(1.0, max(0.0, (gain - g0) / (g1 - g0)))
            return (math.sqrt(max(0.0, k0)) * (1 - part) + math.sqrt(max(0.0, k1)) * part) ** 2
    raise AssertionError(f"a gain of {gain} is not on the frontier {front}")


def _mmlu(result: dict[str, Any]) -> dict[str, Any] | None:
    before = result["mmlu"]
    if before is None:
        return None
    after: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row.get("mmlu"):
            after.setdefault(row["label"], []).append(row["mmlu"]["accuracy"])
    return {
        **{key: before[key] for key in ("accuracy", "standard_error", "n", "shots", "cut", "harness")},
        "after": {label: sum(found) / len(found) for label, found in after.items()},
        "books": {label: len(found) for label, found in after.items()},
    }


# -------------------------------------------------------------------- the picture


def chart(points: Sequence[Row]) -> Any:
    """Gain upwards, KL to the right (log scale): up and to the left is better. A line joins one rank's scales.

    Raises:
        ModuleNotFoundError: Altair is not installed.
    """
    alt = altair()
    shown = [
        p | {"rank": "none" if p["rank"] is None else str(p["rank"])}
        for p in points
        if p["kl"] is not None and p["kl"] > 0
    ]
    base = alt.Chart(alt.Data(values=shown)).encode(
        x=alt.X(
            "kl:Q",
            title="KL on unrelated text (nats per token, log)",
            scale=alt.Scale(type="log", nice=False, padding=16),
        ),
        y=alt.Y("gain:Q", title="gain on the book's later text (nats per token)"),
        color=alt.Color("method:N", title="method", legend=alt.Legend(orient="bottom")),
        detail="label:N",
    )
    dots = base.mark_point(filled=True, size=90, opacity=0.85).encode(
        shape=alt.Shape("rank:N", title="rank", legend=alt.Legend(orient="bottom")),
        tooltip=[
            "label:N",
            alt.Tooltip("scale:Q", title="output scale"),
            alt.Tooltip("gain:Q", format=".4f"),
            alt.Tooltip("kl:Q", title="KL", format=".4f"),
            alt.Tooltip("bits_per_byte_change:Q", title="bits per byte, change", format="+.4f"),
            alt.Tooltip("parameters:Q", format=",d"),
            "books:Q",
        ],
    )
    lines = base.mark_line(strokeWidth=1.2, opacity=0.45).encode(order="scale:Q")
    return (lines + dots).properties(height=400)


def draw(points: Sequence[Row], folder: Path) -> list[Path]:
    """Writes forgetting.html, which needs no network, and forgetting.png.

    Raises:
        ModuleNotFoundError: Altair or vl-convert is not installed.
    """
    picture = chart(finite(list(points)))
    page = picture.properties(width="container", autosize={"type": "fit-x", "contains": "padding"})
    phone = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    files = {
        folder / "forgetting.html": page.to_html(inline=True).replace("<head>", f"<head>{phone}", 1).encode(),
        folder / "forgetting.png": png(picture.properties(width=640)),
    }
    for path, data in files.items():
        write_atomically(path, data)
    return list(files)
