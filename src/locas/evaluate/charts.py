"""Charts of a books evaluation, from plain rows; one description gives the interactive chart and the picture.

Needs Altair, and vl-convert for pictures: pip install "locas[plots]".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Chart = Any

_GREY = "#8a8f98"
_HUES = ("#0b6fb8", "#d1495b", "#e08e1b", "#2a9d6f", "#7b5ea7", "#a0522d", "#17a2b8", "#c2418c", "#6b7a00", "#444b54")
_PARTS = {"gate": "#e08e1b", "key": "#0b6fb8", "value": "#2a9d6f"}
PICTURE_WIDTH = 760  # of pictures; pages stretch a chart to their width


def altair() -> Any:
    """The plotting library. Raises ModuleNotFoundError, saying how to install it, where it is missing."""
    try:
        import altair as alt
        import vl_convert  # noqa: F401 - makes the pictures and the page's script
    except ImportError as error:
        raise ModuleNotFoundError('reports need Altair and vl-convert: pip install "locas[plots]"') from error
    alt.data_transformers.disable_max_rows()
    return alt


def colours(methods: Sequence[str], plain: str, main: str | None) -> dict[str, str]:
    """A colour for each method: grey for the plain one, the first hue for the main one."""
    others = [m for m in methods if m not in (plain, main)]
    hues = dict(zip(others, [_HUES[1 + i % (len(_HUES) - 1)] for i in range(len(others))], strict=True))
    return {m: _GREY if m == plain else _HUES[0] if m == main else hues[m] for m in methods}


def along(rows: Sequence[Row], books: Sequence[str], palette: Mapping[str, str]) -> Chart:
    """Perplexity along the book. rows: book, method, tokens, perplexity; `books` are offered in a menu, first first."""
    alt = altair()
    chosen = alt.param(name="shown", value=books[0], bind=alt.binding_select(options=list(books), name="Book: "))
    log = alt.Scale(type="log", nice=False, padding=6)
    # Without an expression, Vega leaves out the labels of a logarithmic axis that spans much less than a decade.
    labelled = alt.Axis(labelExpr="format(datum.value, ',')", labelOverlap="greedy", tickCount=8)
    lines = (
        alt.Chart(alt.Data(values=list(rows)))
        .transform_filter("datum.book == shown")
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("tokens:Q", title="tokens read", axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("perplexity:Q", title="perplexity (log scale)", scale=log, axis=labelled),
            color=_colour(palette),
            tooltip=["method:N", alt.Tooltip("tokens:Q", format=","), alt.Tooltip("perplexity:Q", format=".2f")],
        )
    )
    return lines.add_params(chosen).properties(height=320)


def differences(rows: Sequence[Row], means: Sequence[Row], palette: Mapping[str, str]) -> Chart:
    """Paired differences. rows: method, book, difference; means: method, mean, low, high. A negative one is better."""
    alt = altair()
    # Options under the name, so that a phone's width is enough.
    labels = alt.Axis(labelLimit=150, labelExpr="split(datum.label, ':')", labelBaseline="middle")
    y = alt.Y("method:N", title=None, sort=[m["method"] for m in means], axis=labels)
    colour = alt.Color("colour:N", scale=None)
    painted = [r | {"colour": palette[r["colour_of"]]} for r in rows]
    means = [m | {"colour": palette[m["colour_of"]]} for m in means]
    x = alt.X("difference:Q", title="difference in bits per byte", axis=_difference_axis(titleAnchor="end"))
    base = alt.Chart(alt.Data(values=means))
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color="#999", strokeDash=[4, 3]).encode(x="x:Q")
    dots = (
        alt.Chart(alt.Data(values=painted))
        .mark_circle(size=36, opacity=0.5, stroke="white", strokeWidth=0.5)
        .encode(x=x, y=y, color=colour, tooltip=["method:N", "book:N", alt.Tooltip("difference:Q", format="+.4f")])
    )
    span = base.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q"), x2="high:Q", y=y, color=colour)
    point = base.mark_point(filled=True, size=110, shape="diamond", stroke="white", strokeWidth=1, opacity=1).encode(
        x=alt.X("mean:Q"),
        y=y,
        color=colour,
        tooltip=["method:N", *(alt.Tooltip(f"{k}:Q", format="+.4f") for k in ("mean", "low", "high"))],
    )
    lines = max((m["method"].count(":") + 1 for m in means), default=1)
    return alt.layer(zero, span, dots, point).properties(height=alt.Step(max(46, 16 + 14 * lines)))


def cost(rows: Sequence[Row], what: str, title: str, palette: Mapping[str, str]) -> Chart:
    """Cost against quality. rows: method, difference, and `what`, the cost; costs of 0 stay out (log scale)."""
    alt = altair()
    shown = [r for r in rows if (r[what] or 0) > 0]
    axis = alt.Axis(format="~s" if what == "parameters" else "~r", tickCount=5, labelOverlap="greedy")
    base = alt.Chart(alt.Data(values=shown)).encode(
        x=alt.X(f"{what}:Q", title=title, scale=alt.Scale(type="log", nice=False, padding=30), axis=axis),
        y=alt.Y(
            "difference:Q",
            title="difference in bits per byte",
            scale=alt.Scale(zero=True, padding=14),
            axis=_difference_axis(),
        ),
        color=_colour(palette, [r["method"] for r in shown]),
        tooltip=["method:N", alt.Tooltip(f"{what}:Q", format=",.3~f"), alt.Tooltip("difference:Q", format="+.4f")],
    )
    return base.mark_point(filled=True, size=150, opacity=0.9).properties(height=300)


def words(rows: Sequence[Row], books: Sequence[str]) -> Chart:
    """Words on which the memory helps most. rows: book, word, gain, count, before, after."""
    alt = altair()
    chosen = alt.param(name="words_of", value=books[0], bind=alt.binding_select(options=list(books), name="Book: "))
    return (
        alt.Chart(alt.Data(values=list(rows)))
        .transform_filter("datum.book == words_of")
        .mark_bar(color=_HUES[3], height=14)
        .encode(
            x=alt.X("gain:Q", title="nats saved over the whole book"),
            y=alt.Y("word:N", sort="-x", title=None, axis=alt.Axis(labelLimit=160)),
            tooltip=[
                "word:N",
                alt.Tooltip("count:Q", title="times"),
                alt.Tooltip("before:Q", title="nats each, without", format=".2f"),
                alt.Tooltip("after:Q", title="with", format=".2f"),
            ],
        )
        .add_params(chosen)
        .properties(height=alt.Step(20))
    )


def norms(rows: Sequence[Row]) -> Chart:
    """Length of the slots' rows. rows: layer, part, low, q1, median, q3, high."""
    alt = altair()
    parts = [p for p in _PARTS if any(r["part"] == p for r in rows)]
    scale = alt.Scale(domain=parts, range=[_PARTS[p] for p in parts])
    legend = alt.Legend(title=None, orient="top")
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("part:N", sort=parts),
        color=alt.Color("part:N", scale=scale, sort=parts, legend=legend),
        tooltip=["layer:O", "part:N", *(alt.Tooltip(f"{k}:Q", format=".3f") for k in ("low", "median", "high"))],
    )
    length = alt.Y("low:Q", title="length of a slot's row", scale=alt.Scale(domainMin=0))
    return alt.layer(
        base.mark_rule(opacity=0.6).encode(y=length, y2="high:Q"),
        base.mark_bar(size=7, opacity=0.85).encode(y=alt.Y("q1:Q"), y2="q3:Q"),
        base.mark_tick(size=11, thickness=2, color="black").encode(y=alt.Y("median:Q"), color=alt.value("#111")),
    ).properties(height=260)


def page_spec(chart: Chart) -> dict[str, Any]:
    """The chart for a page: as wide as its place."""
    spec: dict[str, Any] = _styled(chart.properties(width="container")).to_dict()
    return spec


def picture(chart: Chart, title: str) -> bytes:
    """The chart as a PNG, in the reports' style and with a title."""
    heading = altair().TitleParams(title, anchor="start", offset=12)
    return png(_styled(chart.properties(width=PICTURE_WIDTH, title=heading)))


def png(chart: Chart, scale: float = 2) -> bytes:
    """The chart as it is, as a PNG of `scale` times a screen's resolution."""
    import vl_convert

    data: bytes = vl_convert.vegalite_to_png(chart.to_json(), scale=scale)
    return data


def _styled(chart: Chart) -> Chart:
    return (
        chart.configure_view(stroke=None)
        .configure(background="white", font="system-ui, sans-serif", padding=8)
        .configure_axis(
            gridColor="#eceef1", domainColor="#9aa0a6", labelFontSize=12, titleFontSize=12, titleColor="#333"
        )
        .configure_legend(labelFontSize=12, labelLimit=240, symbolStrokeWidth=3)
        .configure_title(fontSize=15)
    )


def _difference_axis(**more: Any) -> Any:
    return altair().Axis(format="+.3~f", tickCount=5, labelOverlap="greedy", **more)


def _colour(palette: Mapping[str, str], only: Sequence[str] | None = None) -> Any:
    alt = altair()
    names = [m for m in palette if only is None or m in only]
    scale = alt.Scale(domain=names, range=[palette[m] for m in names])
    legend = alt.Legend(title=None, orient="top", columns=2, symbolType="circle", symbolSize=90)
    return alt.Color("method:N", scale=scale, sort=names, legend=legend)
