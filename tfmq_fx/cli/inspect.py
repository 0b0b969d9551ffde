"""``tfmq-fx inspect``: the temporal block of a model as a tree, or what an artefact holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table
from rich.tree import Tree

from tfmq_fx.cli.console import console, size_text, stage
from tfmq_fx.cli.float_models import require_no_artefact
from tfmq_fx.cli.options import Model, OptionalArtefact

if TYPE_CHECKING:
    from pathlib import Path

    from torch import fx

    from tfmq_fx.passes.analysis import TemporalBlock

__all__ = ["inspect"]


def inspect(model: Model = None, artefact: OptionalArtefact = None) -> None:
    """Show a model's temporal block as a tree, or what a quantized artefact holds."""
    require_no_artefact(model, f"show it with: tfmq-fx inspect --artefact {model}")
    if artefact is not None:
        _inspect_artefact(artefact)
    if model is not None or artefact is None:
        _inspect_model(model)


def _inspect_model(name: str | None) -> None:
    from tfmq_fx.cli.example_inputs import example_inputs
    from tfmq_fx.data.bundled_model import load_model
    from tfmq_fx.frontend.capture import capture
    from tfmq_fx.passes.analysis import find_temporal_block

    stage("loading the model")
    module, _ = load_model(name)
    stage("capturing its graph")
    program = capture(module, example_kwargs=example_inputs(module))
    block = find_temporal_block(program)
    parameters = sum(p.numel() for p in module.parameters())
    console().print(f"{type(module).__name__}: {parameters / 1e6:.2f} M parameters, {len(program.graph.nodes)} nodes")
    console().print(_tree(block) if block else str(block))


def _tree(block: TemporalBlock) -> Tree:
    """The block with every linear's shape and reader."""
    from tfmq_fx.passes.support.predicates import fqn

    inputs = ", ".join((block.timestep, *block.finite))
    tree = Tree(f"[bold]temporal block[/] of ({inputs}): {len(block.nodes)} nodes, {len(block.linears)} linears")
    trunk = tree.add(f"[bold cyan]h[/]: {len(block.time_embedding)} linears in the time embed")
    for node in block.time_embedding:
        trunk.add(f"{fqn(node)} [dim]{_weight_shape(node)}[/]")
    layers = tree.add(f"[bold cyan]g[/]: {len(block.embedding_layers)} embedding layers")
    for layer in block.embedding_layers:
        layers.add(f"{layer.fqn} [dim]{_weight_shape(layer.linear)}[/] → {layer.feeds or 'output'}")
    features = tree.add(f"[bold cyan]features[/]: {len(block.features)} read outside the block")
    for shape, count in Counter(_feature_shape(node) for node in block.features).items():
        features.add(f"{count} of shape [dim]{shape}[/]")
    return tree


def _weight_shape(node: fx.Node) -> str:
    from tfmq_fx.passes.support.predicates import node_value, weight_node

    weight = weight_node(node)
    return "" if weight is None else "(" + " × ".join(str(int(size)) for size in node_value(weight).shape) + ")"


def _feature_shape(node: fx.Node) -> str:
    from torch import Tensor

    from tfmq_fx.passes.support.predicates import node_value

    value = node_value(node)
    if not isinstance(value, Tensor):
        return "unknown"
    return "(" + " × ".join(str(size) if isinstance(size, int) else "batch" for size in value.shape) + ")"


def _inspect_artefact(path: Path) -> None:
    from tfmq_fx.artefact.load import load
    from tfmq_fx.diagnostics.comparison import path_bytes
    from tfmq_fx.passes.analysis import find_temporal_block
    from tfmq_fx.passes.support.predicates import is_weighted

    program = load(path)
    weighted = [node for node in program.graph_module.graph.nodes if is_weighted(node)]
    quantized = [node for node in weighted if _has_integer_weight(node)]
    block = find_temporal_block(program.graph_module, program.timestep)
    timesteps = program.timesteps
    table = Table(title=f"{path} ({size_text(path_bytes(path))})", show_header=False, title_justify="left")
    table.add_row("model", program.interface.model_class or "unknown")
    table.add_row("convs and linears", f"{len(weighted)}, {len(quantized)} of them with integer weights")
    table.add_row("temporal block", f"{len(block.linears)} linears" if block else f"none: {block.reason}")
    if timesteps is not None:
        table.add_row("timesteps", f"{len(timesteps)}: {timesteps[0].item():g} … {timesteps[-1].item():g}")
    table.add_row("scheduler", f"{program.scheduler.get('beta_schedule', 'unknown')} betas, "
                  f"{program.scheduler.get('prediction_type', 'unknown')} prediction")  # fmt: skip
    table.add_row("compared with float", str(program.fidelity or "not measured"))
    for entry in () if program.fidelity is None else program.fidelity.timesteps:
        if entry.timestep is not None:
            lost = f"relative error {entry.error:.2g} (PSNR {entry.psnr:.1f} dB)"
            table.add_row(f"  timestep {entry.timestep:g}", lost)
    resolved = {
        "weight_range": program.config.resolved_weight_range,
        "symmetric_weights": program.config.resolved_symmetric_weights,
    }
    for field, value in {**program.config.to_dict(), **resolved}.items():
        table.add_row(field, str(value))
    console().print(table)
    floats = Tree(f"[bold]kept float[/]: {len(program.kept_float)}")
    for layer, reason in program.kept_float.items():
        floats.add(f"{layer}: [dim]{reason}[/]")
    console().print(floats)


def _has_integer_weight(node: fx.Node) -> bool:
    from torch import fx

    weight = node.args[1]
    return isinstance(weight, fx.Node) and "dequantize" in str(weight.target)
