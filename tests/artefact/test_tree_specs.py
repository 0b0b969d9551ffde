import dataclasses
import json

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.utils import _pytree as pytree

from tfmq_fx import ArtefactError
from tfmq_fx.artefact.tree_specs import check_tree_spec, load_tree_spec

ONE = torch.ones(1)


@dataclasses.dataclass
class Own:
    """An output class of a user's model."""

    sample: torch.Tensor
    extra: torch.Tensor | None = None


@dataclasses.dataclass
class Unregistered:
    sample: torch.Tensor


pytree.register_dataclass(Own, serialized_type_name=f"{Own.__module__}.Own")


@pytest.mark.parametrize(
    "tree",
    [
        ONE,
        None,
        (ONE, [ONE, None], {"a": ONE, "b c.d-e/f:0": (ONE,)}),
        ((ONE,), {"timestep": ONE, "added_cond_kwargs": {"resolution": None}}),
        {1: ONE},
        Transformer2DModelOutput(sample=ONE),
        Own(ONE),
        (Own(ONE, ONE), []),
    ],
    ids=str,
)
def test_what_models_take_and_return_is_admitted(tree):
    spec = pytree.tree_structure(tree)
    assert load_tree_spec(pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize(
    "value", [None, 1, "", "null", "[]", "[1]", "[1, 2, 3]", '[1, {"type": null}]', "[true, null]"]
)
def test_what_is_none_is_refused(value):
    with pytest.raises(ArtefactError):
        check_tree_spec(value)


def test_a_field_that_a_class_does_not_have():
    text = pytree.treespec_dumps(pytree.tree_structure(Own(ONE)))
    with pytest.raises(ArtefactError, match="context"):
        check_tree_spec(text.replace("extra", "__init__"))


def test_a_class_that_is_not_registered_says_what_to_do():
    spec = {"type": f"{__name__}.Unregistered", "context": '["sample"]', "children_spec": [
        {"type": None, "context": None, "children_spec": []}]}  # fmt: skip
    with pytest.raises(ArtefactError, match="register that output dataclass first"):
        check_tree_spec(json.dumps([1, spec]))
