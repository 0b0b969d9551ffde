"""How far a graph has come, and what to call next where a stage was given something else than it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e import ObserverBase

__all__ = ["CAPTURED", "CONVERTED", "PREPARED", "describe", "held_model", "live_observers", "stage_of"]

CAPTURED, PREPARED, CONVERTED = "captured", "prepared", "converted"

#: Where pipelines keep the model that is quantized.
MODELS = ("unet", "transformer", "prior")


def describe(value: Any) -> str:
    """What ``value`` is, and what to pass or call instead, as the end of a sentence."""
    name = type(value).__name__
    if isinstance(value, fx.GraphModule):
        hints = {
            CAPTURED: "a captured graph that is not prepared: call tfmq_fx.prepare on it first",
            PREPARED: "a graph that is prepared, with observers in it: calibrate it and call tfmq_fx.convert next",
            CONVERTED: "a graph that is converted already: pass it to tfmq_fx.lower",
        }
        return hints[stage_of(value)]
    if name == "QuantizedProgram":
        return "a QuantizedProgram, which is converted already: pass it to tfmq_fx.save or tfmq_fx.lower"
    if isinstance(value, nn.Module):
        return f"a {name}, a float model: call tfmq_fx.capture on it, or tfmq_fx.quantize for the whole way"
    held = held_model(value)
    return f"a {name}, which holds its model: pass pipe.{held}" if held else f"a {name}"


def held_model(value: Any) -> str | None:
    """The name under which a pipeline holds the model that is quantized, None for what is no pipeline."""
    return next((name for name in MODELS if isinstance(getattr(value, name, None), nn.Module)), None)


def stage_of(graph_module: fx.GraphModule) -> str:
    """How far a graph has come: ``"captured"``, ``"prepared"`` or ``"converted"``."""
    if any(not hasattr(observer, "convert") for observer in live_observers(graph_module).values()):
        return PREPARED
    targets = (str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
    if any(target.startswith("quantized_decomposed.dequantize") for target in targets):
        return CONVERTED
    return PREPARED if live_observers(graph_module) else CAPTURED


def live_observers(graph_module: fx.GraphModule) -> dict[fx.Node, torch.nn.Module]:
    """The observers, and fake quantizers in their places, that a graph calls."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    calls = graph_module.graph.nodes
    called = {node: modules[str(node.target)] for node in calls if node.op == "call_module" and node.target in modules}
    return {node: m for node, m in called.items() if isinstance(m, ObserverBase) or hasattr(m, "convert")}
