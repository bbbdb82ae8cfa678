"""The few pieces of HTML that the report is made of: text, tables, images, one page.

Everything given as text is escaped here and nowhere else; arguments named `markup` are HTML
already.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from numbers import Real

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6575; --line: #d9dee6;
  --paper: #ffffff; --band: #f4f6f9; --accent: #1764ab; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adbb; --line: #39414d;
  --paper: #14181e; --band: #1d232b; --accent: #7fb8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.45rem; margin: 3rem 0 .75rem; padding-top: 1rem;
  border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
ul { padding-left: 1.25rem; }
a { color: var(--accent); }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .92rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
td.text, th.text { text-align: left; overflow-wrap: anywhere; min-width: 6.5rem; }
thead th { background: var(--band); }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; padding: 6px; }
figcaption { margin-top: .4rem; max-width: 46rem; }
@media print {
  :root { color-scheme: light; --ink: #000000; --soft: #444444; --line: #bbbbbb;
    --paper: #ffffff; --band: #eeeeee; --accent: #000000; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  table { font-size: 8.5pt; }
  th, td { padding: .2rem .4rem; }
  td.text, th.text { min-width: 2.2cm; }
  figure { margin: .5rem 0; }
  h3 { margin-top: 1rem; }
  h2 { break-before: page; margin-top: 0; }
  h2:first-of-type { break-before: auto; }
  h1, h2, h3 { break-after: avoid; }
  figure, table { break-inside: avoid; }
  figure img { max-height: 23cm; }
}
"""


def text(value: object) -> str:
    """A value as HTML text: escaped, and without what cannot be shown or encoded."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))
    return html.escape(shown, quote=True)


def number(value: object, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where it is missing or not finite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{float(value):,.{digits}f}"


def percent(value: object, digits: int = 2) -> str:
    """A share of 1 in percent; a dash where it is missing or not finite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{100 * float(value):.{digits}f}%"


def paragraph(value: object, *, soft: bool = False) -> str:
    """A paragraph of text; `soft` for remarks."""
    return f'<p class="soft">{text(value)}</p>' if soft else f"<p>{text(value)}</p>"


def heading(level: int, value: object, anchor: str = "") -> str:
    """A heading of level 1 to 6, with an anchor to link to."""
    identity = f' id="{text(anchor)}"' if anchor else ""
    return f"<h{level}{identity}>{text(value)}</h{level}>"


def bullets(values: Sequence[object]) -> str:
    """A list of texts; nothing for none."""
    items = "".join(f"<li>{text(value)}</li>" for value in values)
    return f"<ul>{items}</ul>" if items else ""


def links(targets: Sequence[tuple[str, str]]) -> str:
    """A list of links to anchors of this page, each (anchor, text)."""
    items = "".join(f'<li><a href="#{text(a)}">{text(name)}</a></li>' for a, name in targets)
    return f"<ul>{items}</ul>" if items else ""


def table(
    header: Sequence[object], rows: Sequence[Sequence[object]], *, names: int = 1, caption: str = ""
) -> str:
    """A table.

    Args:
        header: The heads of the columns; none for a table without a head.
        rows: The cells.
        names: How many columns, from the left, hold names (to the left) rather than numbers.
        caption: A line above the table.

    Returns:
        The markup.
    """

    def cells(tag: str, values: Sequence[object]) -> str:
        def attributes(column: int) -> str:
            return ' class="text"' if column < names else ""

        return "".join(f"<{tag}{attributes(i)}>{text(v)}</{tag}>" for i, v in enumerate(values))

    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    label = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{label}{head}<tbody>{body}</tbody></table></div>'


def image(source: str, description: str, caption: str = "") -> str:
    """An image with a data URI for its source, a description for who cannot see it, a caption."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{text(source)}" alt="{text(description)}">{below}</figure>'


def page(title: str, markup: str) -> str:
    """A whole page that loads nothing from anywhere and runs no script."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{markup}\n</body>\n</html>\n"
    )
