"""The page's HTML: tables, figures, pieces with their experts, and the document around them.

The page is one file without scripts. Runs are switched on and off by style rules alone, and what
appears under the pointer is the titles of elements. Nothing depends on colour.
"""

import html
from collections.abc import Sequence
from typing import Any

from fairseq_evomoe.tools.samples import Piece, Sample

COLOURS = (
    *("#cfe8fc", "#ffe0b8", "#d3f2d3", "#f9d3dd"),
    *("#e4dbfa", "#fff3b0", "#d5f0ee", "#e6e6e6"),
)
"""Backgrounds of experts, on which black text is readable."""

PATTERNS = ("solid", "dashed", "dotted", "double")
"""Lines under the pieces of experts."""

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:0 auto;padding:1rem;
color:#111;background:#fff;overflow-wrap:break-word}
table{border-collapse:collapse;margin:.5rem 0}th,td{padding:.25rem .7rem;
border-bottom:1px solid #ccc;text-align:right;vertical-align:top}
th:first-child,td:first-child,td.text,th.text{text-align:left}th[scope=row]{font-weight:inherit}
.wide{overflow-x:auto;max-width:100%}
svg{max-width:100%;height:auto;min-width:40rem}figcaption,.note{color:#444}figure{margin:1rem 0}
.points use{opacity:0}.points use:hover{opacity:1}
fieldset{border:1px solid #ccc;margin:1rem 0}fieldset label{margin-right:1.2rem;white-space:nowrap}
.piece{color:#111;border-bottom:3px solid #111;padding:0 .1em;white-space:nowrap}
.piece sub{font-size:.65em}.pieces{line-height:2.1}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem .8rem}dt{color:#444}dd{margin:0}
"""


def cell(value: Any) -> str:
    """A table's cell as text: numbers with four significant digits."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, name: str) -> str:
    """Format an HTML table whose first column names the rows.

    Columns with long text are aligned left. The table can be scrolled sideways by itself, so that
    the page fits a phone.

    Args:
        head: names of the columns.
        rows: values.
        name: what the table shows, for screen readers.
    """

    texts = {
        i
        for row in rows
        for i, value in enumerate(row)
        if i and isinstance(value, str) and len(value) > 20
    }

    def formatted(tag: str, i: int, value: Any) -> str:
        kind = ' class="text"' if i in texts else ""
        scope = ' scope="col"' if tag == "th" else ""
        if tag == "td" and i == 0:
            tag, scope = "th", ' scope="row"'
        return f"<{tag}{scope}{kind}>{html.escape(cell(value))}</{tag}>"

    def line(tag: str, values: Sequence[Any]) -> str:
        return "<tr>" + "".join(formatted(tag, i, v) for i, v in enumerate(values)) + "</tr>"

    top, body = line("th", head), "".join(line("td", row) for row in rows)
    label = html.escape(name, quote=True)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}">'
        f"<table><thead>{top}</thead><tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, caption: str) -> str:
    """A figure with its caption, which is also its name for screen readers."""
    label = html.escape(caption, quote=True)
    drawn = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return (
        f'<figure><div class="wide" role="region" tabindex="0" aria-label="{label}, figure">{drawn}'
        f"</div><figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def switches(names: Sequence[str]) -> tuple[str, str]:
    """A box to tick for each run, and the style rules by which it shows and hides the run."""
    boxes = "".join(
        f'<label><input type="checkbox" id="run-{i}" checked> {html.escape(name)}</label>'
        for i, name in enumerate(names)
    )
    rules = "".join(
        f"body:has(#run-{i}:not(:checked)) .of-run-{i}{{display:none}}" for i in range(len(names))
    )
    return f"<fieldset><legend>Runs to show in the figures</legend>{boxes}</fieldset>", rules


def expert_rules(experts: int) -> str:
    """Style rules of the classes e0, e1, ...: colour and pattern differ for up to 32 experts."""
    return "".join(
        f".e{e}{{background:{COLOURS[e % 8]};border-bottom-style:{PATTERNS[(e + e // 8) % 4]}}}"
        for e in range(experts)
    )


def piece(shown: Piece) -> str:
    """A piece of a word with its first expert's look and number; its title names all experts."""
    said = ", ".join(f"expert {e} with weight {w:.2f}" for e, w in shown.experts)
    numbers = "+".join(str(e) for e, _ in shown.experts[:3])
    look = f" e{shown.experts[0][0]}" if shown.experts else ""
    before = " " if shown.starts else ""
    return (
        f'{before}<span class="piece{look}" title="{html.escape(said, quote=True)}">'
        f"{html.escape(shown.text)}<sub>{numbers}</sub></span>"
    )


def sample(shown: Sample, number: int) -> str:
    """One sentence: its texts, and a row of pieces for each layer."""
    texts = "".join(
        f"<dt>{html.escape(kind)}</dt><dd>{html.escape(text)}</dd>"
        for kind, text in shown.texts.items()
    )
    rows = "".join(
        f"<dt>{html.escape(layer)}</dt>"
        f'<dd class="pieces">{"".join(map(piece, pieces)).strip()}</dd>'
        for layer, pieces in shown.layers.items()
    )
    return f"<h3>Sentence {number}</h3><dl>{texts}{rows}</dl>"


def document(title: str, body: str, *, rules: str = "", refresh: int | None = None) -> str:
    """The whole page.

    Args:
        title: of the page.
        body: its HTML.
        rules: further style rules.
        refresh: seconds after which a browser loads the page again; None means never.
    """
    shown = html.escape(title)
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{again}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{shown}</title><style>{STYLE}{rules}</style></head>"
        f"<body><main><h1>{shown}</h1>{body}</main></body></html>\n"
    )
