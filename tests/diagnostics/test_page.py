"""A page is one file, and what names hold stands there as text."""

import base64
import io
import math
from html.parser import HTMLParser

from PIL import Image
from rich.table import Table
from rich.text import Text

from tfmq_fx.diagnostics.page import Bar, Bars, Grid, grid_of, picture_of, render_page


class Reader(HTMLParser):
    """Collects tags that are open at the end, addresses, and text by tag."""

    def __init__(self):
        super().__init__()
        self.stack, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style",) and data.strip():
            self.text.append((self.stack[-1], data.strip()))


def read(parts, title="A title"):
    reader = Reader()
    reader.feed(render_page(title, parts))
    assert not reader.stack
    return reader


def test_a_picture_is_inside_the_file():
    image = Image.new("RGB", (3, 2), "red")
    reader = read([picture_of("Images", image, "red")])
    (address,) = reader.addresses
    assert address.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size == (3, 2)
    assert ("h2", "Images") in reader.text and ("p", "red") in reader.text


def test_names_are_text():
    name = "<script>alert('x')</script>&"
    reader = read([Grid(name, (name,), ((name,),)), Bars(name, (Bar(name, 1.0, name),), name)], name)
    assert {data for _, data in reader.text} == {name}


def test_the_longest_bar_has_all_the_room():
    rows = tuple(Bar(str(value), value, "") for value in (0.0, 5.0, 10.0, -3.0, math.nan, math.inf))
    bars = Bars("Bars", rows)
    assert [bars.width(row) for row in rows] == [0.0, 50.0, 100.0, 0.0, 0.0, 100.0]
    assert "width: 50.00%" in render_page("A title", [bars])
    nothing = Bars("Bars", (Bar("a", 0.0, ""),))
    assert nothing.width(nothing.rows[0]) == 0.0 and Bars("None", ()).rows == ()


def test_a_table_of_the_terminal():
    table = Table("", "float", title="[bold]size[/]")
    table.add_row(Text("a [file]"), "[green]3[/] MB")
    assert grid_of(table) == Grid("size", ("", "float"), (("a [file]", "3 MB"),))
    reader = read([grid_of(table)])
    assert ("td", "3 MB") in reader.text and ("th", "float") in reader.text
