import copy
import pickle

import pytest

from tfmq_fx.config.frozen_mapping import FrozenMapping, freeze, thaw


def test_it_equals_the_dictionary_hashes_and_cannot_change():
    mapping = freeze({"b": {"bits": 4}, "a": {"names": ["x", "y"]}})
    assert mapping == {"b": {"bits": 4}, "a": {"names": ("x", "y")}} and list(mapping) == ["b", "a"]
    assert hash(mapping) == hash(freeze({"a": {"names": ("x", "y")}, "b": {"bits": 4}}))
    assert mapping != freeze({"b": {"bits": 5}})
    with pytest.raises(TypeError):
        mapping["b"] = 1
    with pytest.raises(TypeError):
        mapping["b"]["bits"] = 1
    assert repr(FrozenMapping({"a": 1})) == "{'a': 1}"


def test_what_it_was_made_from_does_not_change_it():
    values = {"a": 1}
    mapping = FrozenMapping(values)
    values["a"] = 2
    assert mapping["a"] == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_it_is_copied_and_pickled(copied):
    mapping = freeze({"a": {"b": [1]}})
    assert copied(mapping) == mapping and type(copied(mapping)) is FrozenMapping


def test_thawed_it_is_what_json_has():
    plain = {"a": {"b": [1, {"c": None}]}}
    assert thaw(freeze(plain)) == plain and type(thaw(freeze(plain))["a"]) is dict
