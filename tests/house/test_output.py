"""What the library says, it says through ``logging`` and ``warnings``: only the command line prints."""

import ast

from tests.house.sources import ROOT, dotted, sources

#: Prints graphs when its user asks for it by name.
ON_REQUEST = "tfmq_fx.passes.observation"


def test_only_the_command_line_prints():
    found = []
    for source in (source for name, source in sources().items() if name != ON_REQUEST):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and dotted(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{source.path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_loggers_are_called_like_their_module():
    for source in sources().values():
        calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]
        for node in calls if source.room != "cli" else ():
            name = dotted(node.func)
            if name.endswith("getLogger"):
                assert [dotted(argument) for argument in node.args] == ["__name__"], source.name
            assert name not in ("logging.basicConfig", "logging.disable", "logging.info", "logging.warning"), (
                source.name
            )


def test_every_progress_bar_obeys_the_switch():
    bars = [
        (source.name, {keyword.arg for keyword in node.keywords}, source.path.read_text(encoding="utf-8"))
        for source in sources().values()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in ("Progress", "track")
    ]
    assert len(bars) >= 4
    for name, options, text in bars:
        assert {"disable", "console"} <= options, name
        assert "draws_progress" in text, name
