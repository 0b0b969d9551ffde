"""Progress bars: where they are drawn, and the one switch."""

import sys

import pytest

from tfmq_fx.config.progress import SWITCH, draws_progress


class Terminal:
    """A stderr that says whether it is a terminal."""

    def __init__(self, is_terminal):
        self.isatty = lambda: is_terminal

    def write(self, text):
        return len(text)

    def flush(self):
        pass


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (SWITCH, "FORCE_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("is_terminal", "switch", "wanted", "drawn"),
    [
        (True, None, True, True),
        (True, "1", True, True),
        (True, "0", True, False),
        (True, None, False, False),
        (False, None, True, False),
        (False, "1", True, False),
    ],
)
def test_a_bar_is_drawn_on_a_terminal_where_it_is_wanted(monkeypatch, is_terminal, switch, wanted, drawn):
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    assert draws_progress(wanted) is drawn
