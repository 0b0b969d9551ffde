"""One HTML file that holds pictures, tables and bars, and needs nothing beside it: to be opened, kept and sent."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL import Image
from rich.table import Table
from rich.text import Text

__all__ = ["Bar", "Bars", "Grid", "Part", "Picture", "grid_of", "picture_of", "render_page"]


@dataclass(frozen=True)
class Picture:
    """A picture, inside the file.

    Attributes:
        title: Its heading.
        source: A ``data:`` address of a PNG.
        caption: What it shows.
    """

    title: str
    source: str
    caption: str = ""
    kind: str = "picture"


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: Its heading.
        header: The heads of its columns; none for rows of names and values.
        rows: Its cells.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kind: str = "grid"


@dataclass(frozen=True)
class Bar:
    """A row of :class:`Bars`.

    Attributes:
        label: Its name.
        value: Its length; negative numbers, and what is no number, have none.
        text: What stands behind it.
        muted: Whether it is drawn in grey.
    """

    label: str
    value: float
    text: str
    muted: bool = False


@dataclass(frozen=True)
class Bars:
    """Values beside each other, the largest as long as there is room for.

    Attributes:
        title: Their heading.
        rows: The bars.
        caption: What the colours mean.
    """

    title: str
    rows: tuple[Bar, ...]
    caption: str = ""
    kind: str = "bars"

    def width(self, row: Bar) -> float:
        """The length of a row's bar in percent of the longest."""
        largest = max((bar.value for bar in self.rows if bar.value < float("inf")), default=0.0)
        share = row.value / largest if largest > 0 else 0.0
        return 100.0 * min(max(share, 0.0), 1.0) if share == share else 0.0


Part = Picture | Grid | Bars

TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2330; --paper: #fff; --line: #d8dde6; --bar: #3b6fd4; --muted: #9aa3b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --paper: #14181f; --line: #323a47; --bar: #6f9bf0; --muted: #626c7c; }
}
body { margin: 2rem auto; max-width: 68rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p { color: var(--muted); margin: .3rem 0; }
img { max-width: 100%; image-rendering: pixelated; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.track { width: 45%; } td.text { white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { height: .8rem; min-width: 1px; background: var(--bar); border-radius: 2px; }
.bar.muted { background: var(--muted); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}
<section>
<h2>{{ part.title }}</h2>
{% if part.kind == "picture" %}
<img alt="{{ part.title }}" src="{{ part.source }}">
{% elif part.kind == "grid" %}
<div class="wide"><table>
{% if part.header %}
<tr>{% for head in part.header %}<th>{{ head }}</th>{% endfor %}</tr>
{% endif %}
{% for row in part.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% else %}
<div class="wide"><table>
{% for row in part.rows %}
<tr><td>{{ row.label }}</td><td class="track"><div class="bar{{ " muted" if row.muted }}"
 style="width: {{ "%.2f"|format(part.width(row)) }}%"></div></td><td class="text">{{ row.text }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if part.caption %}
<p>{{ part.caption }}</p>
{% endif %}
</section>
{% endfor %}
</body>
</html>
""")


def render_page(title: str, parts: Sequence[Part]) -> str:
    """The HTML of a page; whatever names and sentences hold stands there as text.

    Args:
        title: Its heading.
        parts: What it shows, from top to bottom.
    """
    return TEMPLATE.render(title=title, parts=parts)


def picture_of(title: str, image: Image.Image | bytes, caption: str = "") -> Picture:
    """A picture from an image, or from the bytes of a PNG."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return Picture(title, f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}", caption)


def grid_of(table: Table) -> Grid:
    """A table that the terminal shows, as one of a page."""
    header = tuple(_plain(column.header) for column in table.columns)
    rows = zip(*([_plain(cell) for cell in column.cells] for column in table.columns), strict=True)
    return Grid(_plain(table.title or ""), header if any(header) else (), tuple(rows))


def _plain(value: Any) -> str:
    return value.plain if isinstance(value, Text) else Text.from_markup(str(value)).plain
