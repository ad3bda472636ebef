"""One self-contained HTML page: text, a table, and interactive charts whose script is inside."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from locas.evaluate import charts


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: plain text.
        text: plain text.
        charts: (name of its file, chart, title).
        body: HTML that follows the charts; whoever makes it has escaped it.
    """

    title: str
    text: str
    charts: Sequence[tuple[str, Any, str]] = ()
    body: str = ""


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1d2129; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 1rem 0 .25rem; } h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
h3 { font-size: .95rem; margin: 1rem 0 .25rem; font-weight: 600; color: #444; }
p { margin: .25rem 0 .75rem; } .dim { color: #5b6470; font-size: .9rem; }
section { background: white; border: 1px solid #e3e6ea; border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #eceef1; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: white; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .4rem; }
.chart { width: 100%; } .chart.vega-embed { display: block; padding-right: 0; }
.vega-bindings { margin: .25rem 0; } .vega-bind-name { margin-right: .4rem; }
.vega-bindings select { font: inherit; max-width: 70vw; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.text { white-space: pre-line; overflow-wrap: anywhere; line-height: 1.75; }
.text span { border-radius: 3px; }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""

_DRAW = """
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(document.getElementById(place.id + "-spec").textContent);
  vegaEmbed(place, spec, {actions: false, renderer: "svg"}).catch((error) => { place.textContent = String(error); });
}
"""


def page(results: dict[str, Any], sections: Sequence[Section]) -> str:
    """The page as a string. results: of a books evaluation."""
    import vl_convert

    books, backbone = results["books"], results["backbone"]
    tokens = sum(b["tokens"] for b in books)
    title = f"{len(books)} book{'s' * (len(books) != 1)}, {tokens:,} tokens"
    lead = f"Read online by {backbone['name']} ({backbone['parameters']:,} parameters); {results['device']}."
    parts = [
        f"<h1>{html.escape(title)}</h1><p class='dim'>{html.escape(lead)}</p>",
        f"<section><h2>All books</h2><div class='scroll'>{_table(results)}</div>{_note(results)}</section>",
        *(_section(s) for s in sections),
        _provenance(results),
    ]
    script = vl_convert.javascript_bundle(None).replace("</script", "<\\/script")  # type: ignore[arg-type]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>locas: {html.escape(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main>"
        f"<script type='module'>{script}\n{_DRAW}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    drawn = []
    for name, chart, title in section.charts:
        heading = f"<h3>{html.escape(title)}</h3>" if len(section.charts) > 1 else ""
        # In a script element only "</" and "<!--" mean anything.
        spec = json.dumps(charts.page_spec(chart)).replace("<", "\\u003c")
        drawn.append(
            f"{heading}<div class='chart' id='{name}'></div>"
            f"<script type='application/json' id='{name}-spec'>{spec}</script>"
        )
    text = f"<p class='dim'>{html.escape(section.text)}</p>"
    return f"<section><h2>{html.escape(section.title)}</h2>{text}{''.join(drawn)}{section.body}</section>"


def _table(results: dict[str, Any]) -> str:
    header = ["", "bits per byte", "perplexity", "mean of chunks'", "parameters", "time", "peak memory"]
    rows = []
    for name, m in results["methods"].items():
        numbers = [
            _number(m["bits_per_byte"], ".4f"),
            _number(m["perplexity"], ".2f"),
            _number(m["perplexity_chunk_mean"], ".2f"),
            _number(m["parameters"], ","),
            _number(m["relative_time"], ".2f", "×"),
            _number(m["relative_memory"], ".2f", "×"),
        ]
        rows.append([html.escape(name), *numbers])
    lines = ["<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows]
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _note(results: dict[str, Any]) -> str:
    text = (
        "Perplexity is exp of the mean loss over all tokens; the mean of chunks' is the token-weighted mean of each "
        "chunk's perplexity, as TempLoRA reports it. Time and memory are relative to truncated reading."
    )
    if len(results["seeds"]) > 1:
        text += " Losses are means over seeds."
    return f"<p class='dim'>{html.escape(text)}</p>"


def _provenance(results: dict[str, Any]) -> str:
    read = results["settings"]["read"]
    facts = {
        "commit": f"{results['commit']}{' (with uncommitted changes)' if results['uncommitted'] else ''}",
        "versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        "device": f"{results['device']}, {results['backbone']['dtype']}",
        "window, chunk": f"{read['window'] or 'default'}, {read['chunk'] or 'default'}",
        "seeds": ", ".join(map(str, results["seeds"])),
    }
    rows = "".join(f"<div>{html.escape(k)}: <code>{html.escape(str(v))}</code></div>" for k, v in facts.items())
    methods = html.escape(json.dumps(results["settings"]["methods"], indent=1))
    return (
        f"<section><h2>Where this comes from</h2><div class='dim'>{rows}</div>"
        f"<details><summary>All settings</summary><div class='scroll'><pre><code>{methods}</code></pre></div></details>"
        "</section>"
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
