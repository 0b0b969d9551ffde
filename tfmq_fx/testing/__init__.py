"""Public tools to test graph rewrites property by property.

``GraphBuilder`` builds exact ATen graphs, ``assert_pass_contract`` checks a pass on a graph and
``assert_pipeline_contract`` the passes of a pipeline in order; ``check_passes`` checks whatever passes a program
applies, and ``bisect_passes`` finds the first one after which its results part. The Hypothesis strategies
``aten_graphs``, ``quantized_graphs`` and ``temporal_graphs`` generate graphs, ``graphs_of_kind`` those of each of
``GRAPH_KINDS``::

    @given(aten_graphs())
    def test_my_pass(generated):
        assert_pass_contract(MyPass, generated.graph_module, generated.example_inputs, exact=True)

The strategies need hypothesis (``pip install tfmq-fx[testing]``); the rest does not.
"""

from typing import TYPE_CHECKING, Any

from .bisect import Bisection, BisectStep, bisect_passes
from .checked_passes import check_passes
from .contract import ContractViolation, assert_pass_contract
from .graph_builder import GraphBuilder
from .pipeline_contract import assert_pipeline_contract
from .temporal_graph import ExpectedBlock, TemporalGraph
from .temporal_model import build_temporal_graph
from .time_path import TimePath

if TYPE_CHECKING:
    from .strategies import (
        GRAPH_KINDS,
        GeneratedGraph,
        aten_graphs,
        graphs_of_kind,
        quantized_graphs,
        temporal_graphs,
        tensor_specs,
    )

__all__ = [
    "GRAPH_KINDS",
    "BisectStep",
    "Bisection",
    "ContractViolation",
    "ExpectedBlock",
    "GeneratedGraph",
    "GraphBuilder",
    "TemporalGraph",
    "TimePath",
    "assert_pass_contract",
    "assert_pipeline_contract",
    "aten_graphs",
    "bisect_passes",
    "build_temporal_graph",
    "check_passes",
    "graphs_of_kind",
    "quantized_graphs",
    "temporal_graphs",
    "tensor_specs",
]

STRATEGIES = (
    "GRAPH_KINDS",
    "GeneratedGraph",
    "aten_graphs",
    "graphs_of_kind",
    "quantized_graphs",
    "temporal_graphs",
    "tensor_specs",
)


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
