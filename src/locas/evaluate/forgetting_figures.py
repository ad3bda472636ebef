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
        intervals, parameters, seconds; at_equal_gain: for each pair of methods, their ranks and step sizes taken
        together, see `equal_gain`: at (share of the gain that both reach, ratio: geometric mean over books, books: each
        one's own figures), left_out: books on which one of them gains nothing; mmlu: accuracy before, and after
        learning, by configuration; failed.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["label"], row["scale"]), []).append(row)
    books = {row["book"] for row in result["rows"]} | {row["book"] for row in result["failed"]}
    points = [_point(rows) for rows in groups.values()]
    whole = {p["label"] for p in points if p["books"] == len(books)}  # the others would be compared on easier books
    rows = [row for row in result["rows"] if row["label"] in whole]
    pairs = [
        {"method": one, "against": other, **_compared(rows, one, other)}
        for one, other in itertools.combinations(dict.fromkeys(row["method"] for row in rows), 2)
    ]
    return {
        "points": points,
        "at_equal_gain": pairs,
        "mmlu": _mmlu(result),
        "failed": result["failed"],
        "bit_exact": bool(result["rows"]) and all(row["bit_exact"] for row in result["rows"]),
    }


def joined(earlier: Row, later: Row) -> Row:
    """Two forgetting.json as one, so that a method or a book can be added without learning all again. The later one's
    methods come first, and where both have a configuration on a book its rows are taken. Methods are compared over
    those configurations that every book of either has; their output scales may differ.

    Raises:
        ValueError: the backbone, how much was learnt and looked at, or the unrelated texts are not the same.
    """
    same = {
        "backbone": lambda x: x["backbone"],
        "how much is learnt and looked at": lambda x: (
            {k: v for k, v in x["settings"]["forgetting"].items() if k != "scales"},
            x["settings"]["max_tokens"],
        ),
        "unrelated texts": lambda x: sorted({name for r in x["rows"] for name in r["unrelated"]}),
    }
    for what, of in same.items():
        if of(earlier) != of(later):
            raise ValueError(f"these results cannot be joined: {what} differ, {of(earlier)} and {of(later)}")
    new = {(r["label"], r["book"]) for r in (*later["rows"], *later["failed"])}
    result = {
        key: later[key] + [r for r in earlier[key] if (r["label"], r["book"]) not in new] for key in ("rows", "failed")
    }
    one, other = earlier["settings"], later["settings"]
    scales = sorted({*one["forgetting"]["scales"], *other["forgetting"]["scales"]})
    settings = {
        "forgetting": other["forgetting"] | {"scales": scales},
        "configurations": one["configurations"] | other["configurations"],
    }
    commits = {commit for x in (earlier, later) for commit in x.get("measured_at_commits", [x["commit"]])}
    return (
        later
        | {"settings": other | settings}
        | {"measured_at_commits": sorted(map(str, commits))}
        | summarise(result | {"mmlu": later["mmlu"] or earlier["mmlu"]})
        | {"rows": result["rows"]}
    )


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


def least_kl(points: Sequence[Row], gain: float) -> float:
    """The least KL at which one of a method's configurations gains at least so much; infinite where none does.

    A configuration of several scales is a curve that begins at scale 0, where gain and KL are 0. Between two
    neighbouring scales the root of KL is taken to be linear in the gain: KL grows with the square of a small change,
    gain with the change. Between configurations nothing is interpolated, beyond them nothing extrapolated.

    Args:
        points: with label, scale, gain, kl.
        gain: nats per token, more than 0.
    """
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for p in points:
        if p["gain"] is not None and p["kl"] is not None:
            curves.setdefault(p["label"], []).append((p["scale"], p["gain"], p["kl"]))
    best = math.inf
    for curve in curves.values():
        dialled = sorted([*curve, (0.0, 0.0, 0.0)] if len(curve) > 1 else curve)
        best = min([best, *(kl for _, reached, kl in dialled if reached >= gain)])
        for (_, g0, k0), (_, g1, k1) in itertools.pairwise(dialled):
            if min(g0, g1) < gain < max(g0, g1):
                part = (gain - g0) / (g1 - g0)
                best = min(best, (math.sqrt(max(0.0, k0)) * (1 - part) + math.sqrt(max(0.0, k1)) * part) ** 2)
    return best


def equal_gain(ours: Sequence[Row], theirs: Sequence[Row]) -> list[dict[str, float]]:
    """KL of two methods at gains that both reach, see `least_kl`.

    Returns:
        gain, kl, kl_against, ratio (kl / kl_against) at `GAINS_COMPARED` gains, evenly spaced up to the largest that
        both reach; nothing where one of them gains nothing.
    """
    most = min(
        max((p["gain"] for p in of if p["gain"] is not None and p["kl"] is not None), default=0.0)
        for of in (ours, theirs)
    )
    found = []
    for i in range(1, GAINS_COMPARED + 1) if most > 0 else ():
        gain = most * (i / GAINS_COMPARED)
        kl, against = least_kl(ours, gain), least_kl(theirs, gain)
        found.append({"gain": gain, "kl": kl, "kl_against": against, "ratio": kl / against if against else math.inf})
    return found


def _compared(rows: Sequence[Row], one: str, other: str) -> Row:
    """Two methods at equal gain, book by book: books differ a hundredfold in what there is to gain."""
    found, left_out = {}, []
    for book in sorted({row["book"] for row in rows}):
        own = [row for row in rows if row["book"] == book]
        at = equal_gain([r for r in own if r["method"] == one], [r for r in own if r["method"] == other])
        if at and all(0 < x["ratio"] < math.inf for x in at):
            found[book] = at
        else:
            left_out.append(book)
    shares = [
        {
            "share": (i + 1) / GAINS_COMPARED,
            "ratio": math.exp(sum(math.log(at[i]["ratio"]) for at in found.values()) / len(found)),
            "books": {book: at[i] for book, at in found.items()},
        }
        for i in (range(GAINS_COMPARED) if found else ())
    ]
    return {"at": shares, "left_out": left_out}


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
        color=alt.Color("method:N", title="method", legend=alt.Legend(orient="bottom", labelLimit=400, columns=2)),
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
