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
_LOOKED_AT = ("window", "chunk", "start_in_every_window", "reuse", "refresh", "sinks")  # how, of the read settings
_MMLU = ("accuracy", "standard_error", "n", "shots", "cut", "harness", "questions_sha256")  # the last one: since then
_ALIKE = 1e-4  # nats or bits by which the bare backbone may differ on one text: rounding on another machine


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
        ValueError: the two were not measured alike: backbone, how much was learnt and looked at and in which windows,
            the texts, MMLU's questions, or the settings of a configuration of which rows of both would be kept.
    """
    new = {(r["label"], r["book"]) for r in (*later["rows"], *later["failed"])}
    kept = {key: [r for r in earlier[key] if (r["label"], r["book"]) not in new] for key in ("rows", "failed")}
    _check_alike(earlier, later, {r["label"] for r in (*kept["rows"], *kept["failed"])} & {label for label, _ in new})
    result = {key: later[key] + kept[key] for key in ("rows", "failed")}
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
        | summarise(result | {"mmlu": (earlier["mmlu"] or {}) | (later["mmlu"] or {}) or None})
        | {"rows": result["rows"]}
    )


def _check_alike(earlier: Row, later: Row, mixed: set[str]) -> None:
    """Raises ValueError unless the two were measured alike. mixed: configurations of which both keep rows."""
    sides = (earlier, later)
    compared = {
        "backbone": [x["backbone"] for x in sides],
        "how much is learnt and looked at": [
            {k: v for k, v in x["settings"]["forgetting"].items() if k != "scales"}
            | {"max_tokens": x["settings"]["max_tokens"]}
            for x in sides
        ],
        "windows and chunks": [{k: x["settings"]["read"].get(k) for k in _LOOKED_AT} for x in sides],
        "unrelated texts": [{"names": sorted({n for r in x["rows"] for n in r["unrelated"]})} for x in sides],
        "texts as the bare backbone reads them": _texts(earlier["rows"], later["rows"]),
        "MMLU's questions": _asked(earlier["mmlu"], later["mmlu"]),
        **{label: [x["settings"]["configurations"][label] for x in sides] for label in sorted(mixed)},
    }
    for what, (one, other) in compared.items():
        if found := _differences(one, other):
            raise ValueError(
                f"these results cannot be joined: {what} differ ({found}); measure again what is to be compared"
            )


def _texts(*sides: Sequence[Row]) -> list[Row]:
    """How long each text is, and what the bare backbone makes of it: those that both sides' rows have."""
    found: list[Row] = [{}, {}]
    for texts, rows in zip(found, sides, strict=True):
        for r in rows:
            texts[f"book {r['book']}"] = {k: r[k] for k in ("tokens", "later_tokens", "later_nll")}
            for name, on in r["unrelated"].items():
                texts[f"unrelated {name}"] = {k: on[k] for k in ("tokens", "bits_per_byte")}
    return [{k: texts[k] for k in found[0].keys() & found[1].keys()} for texts in found]


def _asked(one: Row | None, other: Row | None) -> list[Row]:
    """What says which questions of MMLU were asked, and how; nothing where only one of them has any. Files of before
    their hash was noted are told apart by what the bare backbone answers."""
    if one is None or other is None:
        return [{}, {}]
    keys = ["n", "shots", "cut", "harness"]
    keys.append("questions_sha256" if "questions_sha256" in one and "questions_sha256" in other else "accuracy")
    return [{key: x[key] for key in keys} for x in (one, other)]


def _differences(one: Any, other: Any, name: str = "") -> str:
    """What differs, e.g. "read.window: 512 and 1024"; numbers may differ by rounding. Nothing where all is the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = {key: f"{name}.{key}" if name else str(key) for key in (*one, *other)}
        found = [_differences(one.get(key, "nothing"), other.get(key, "nothing"), n) for key, n in names.items()]
        return ", ".join(x for x in found if x)
    both = isinstance(one, float) and isinstance(other, float)
    rounded = both and name.endswith(("later_nll", "bits_per_byte")) and abs(one - other) <= _ALIKE
    return "" if rounded or one == other else f"{name}: {one} and {other}"


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
        **{key: before[key] for key in _MMLU if key in before},
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
