"""Public tools to test graph rewrites property by property.

``GraphBuilder`` builds exact ATen graphs, ``assert_pass_contract`` checks a pass on a graph, and the
Hypothesis strategies ``aten_graphs`` and ``temporal_graphs`` generate graphs to check it on::

    @given(aten_graphs())
    def test_my_pass(generated):
        assert_pass_contract(MyPass, generated.graph_module, generated.example_inputs, exact=True)

The strategies need hypothesis (``pip install tfmq-fx[testing]``); the rest does not.
"""

from typing import TYPE_CHECKING, Any

from .contract import ContractViolation, assert_pass_contract
from .graph_builder import GraphBuilder
from .time_path import ExpectedBlock, TemporalGraph, TimePath, build_temporal_graph

if TYPE_CHECKING:
    from .strategies import GeneratedGraph, aten_graphs, temporal_graphs, tensor_specs

__all__ = [
    "ContractViolation",
    "ExpectedBlock",
    "GeneratedGraph",
    "GraphBuilder",
    "TemporalGraph",
    "TimePath",
    "assert_pass_contract",
    "aten_graphs",
    "build_temporal_graph",
    "temporal_graphs",
    "tensor_specs",
]

STRATEGIES = ("GeneratedGraph", "aten_graphs", "temporal_graphs", "tensor_specs")


def __getattr__(name: str) -> Any:
    """Import the strategies when they are first asked for, so that hypothesis stays optional."""
    if name in STRATEGIES:
        from . import strategies

        return getattr(strategies, name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    """What is there and what will be imported when it is asked for."""
    return sorted({*globals(), *__all__})
