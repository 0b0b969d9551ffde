"""Files of samplers: a field that is missing, of another kind or of another size is named in one sentence."""

import json

import pytest
import torch

from tfmq_fx import ConfigError
from tfmq_fx.schedulers.json_tables import TableField, read_json, write_json

FIELDS = {"name": str, "steps": int, "eta": float, "times": TableField(("S",)), "rows": TableField(("S", 3))}
VALUES = {"name": "x", "steps": 2, "eta": 0.5, "times": torch.tensor([2.0, 1.0]), "rows": torch.arange(6.0).view(2, 3)}


def test_round_trip(tmp_path):
    found = read_json(write_json(tmp_path / "a.json", VALUES), FIELDS, "a thing")
    assert torch.equal(found["rows"], VALUES["rows"].double()) and found["rows"].dtype == torch.float64
    assert [found[name] for name in ("name", "steps", "eta")] == ["x", 2, 0.5]
    assert type(read_json(write_json(tmp_path / "a.json", {**VALUES, "eta": 0}), FIELDS, "a thing")["eta"]) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", 3), ("name", None), ("steps", 2.0), ("steps", True), ("eta", "1"), ("eta", 10**400), ("eta", False),
        ("times", None), ("times", "x"), ("times", {}), ("times", 1.0), ("times", 10**400), ("times", [1.0, None]),
        ("times", [[1.0], [2.0, 3.0]]), ("times", [float("nan"), 1.0]), ("rows", [[0.0] * 3]),
        ("rows", [[0.0] * 2] * 2),
    ],
)  # fmt: skip
def test_another_kind_is_named(tmp_path, name, value):
    file = write_json(tmp_path / "bad.json", {**VALUES, name: value})
    with pytest.raises(ConfigError, match=rf"bad\.json does not hold a thing: its '{name}' is no "):
        read_json(file, FIELDS, "a thing")


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"name"', "[1]", "null", '"name"'])
def test_what_is_no_such_file(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json does not hold a thing: it (is no JSON|has no 'name')"):
        read_json(tmp_path / "bad.json", FIELDS, "a thing")


def test_what_cannot_be_read_or_lacks_a_field(tmp_path):
    for file in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ConfigError, match="it cannot be read"):
            read_json(file, FIELDS, "a thing")
    (tmp_path / "a.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(ConfigError, match="it has no 'steps'"):
        read_json(tmp_path / "a.json", FIELDS, "a thing")
