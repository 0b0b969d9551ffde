"""Small diffusion models in ATen ops whose temporal block is known because it was built as such.

:class:`TimePath` says what the model looks like, :func:`build_temporal_graph` builds it. The expected
block is noted down while the nodes are made, never computed from the finished graph: it is an oracle
for ``find_temporal_block`` and ``find_conditional_part`` that shares no code with them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .graph_builder import GraphBuilder

__all__ = ["ExpectedBlock", "ExpectedPart", "TemporalGraph", "TimePath", "build_temporal_graph"]

aten = torch.ops.aten

#: Sizes of the model: channels of the feature maps, their side, width of the time embedding.
CHANNELS, SIDE, EMBEDDING = 4, 4, 8
#: Width of a prompt's embedding before its linear.
PROMPT = 6


@dataclass(frozen=True)
class TimePath:
    """What a generated diffusion model looks like; the defaults are those of a plain ``UNet2DModel``.

    Attributes:
        seed: Seed of the weights.
        batch: The batch size, or its example.
        dynamic_batch: Whether the batch is symbolic; then ``sym_size(sample, 0)`` stands on the time path.
        scalar_timestep: Whether the timestep is 0-dim instead of ``[N]``.
        float_timestep: Whether the timestep is float32, as Euler's and flow matching's are, instead of int64.
        timestep_name: Name of the timestep placeholder.
        position: Where the timestep stands among the placeholders.
        broadcast: How the timestep meets the batch: times ones, expanded, or not at all.
        width: Number of sinusoid features; an odd width is padded.
        flip: Whether cosine comes first.
        shift: ``downscale_freq_shift`` of the frequencies.
        scale: Factor on the sinusoid's argument.
        computed_frequencies: Whether the frequencies are computed in the graph or read from a buffer.
        casts: Whether no-op casts stand on the path.
        asserts: Whether metadata assertions stand on the path.
        blocks: Number of residual blocks.
        scale_shift: Whether a block scales and shifts (a chunk of twice the features) instead of adding.
        activation: The SiLU before the ``g_i``: one per block, one for all, or none.
        class_embedding: Whether a class embedding is added to the time embedding: not at all, a table
            look-up, or a table look-up and a linear.
        prompt: Whether the embedding of a prompt, the input ``pooled``, is added before the ``g_i``: not at all, as it
            is, or behind a linear. Not together with ``class_embedding="linear"``: of two layers that end side by side,
            nothing tells which one is a ``g_i``.
        return_embedding: Whether the time embedding is a second output.
        read_features: Whether the sinusoid is read outside the block too.
        read_batch: Whether the symbolic batch size is read outside the block too.
        shape_decoy: Whether something outside reads the dtype of the time embedding, which is no data.
        linear_decoy: Whether a SiLU -> Linear fed by the sample stands in the model.
        sinusoid_decoy: Whether sine and cosine of the sample and of constant positions stand in the model.
        shared_weight_decoy: Whether a linear outside the block reads the weight of the first linear of ``h``.
        dead_branch: Whether something unread is computed from the timestep.
    """

    seed: int = 0
    batch: int = 2
    dynamic_batch: bool = False
    scalar_timestep: bool = False
    float_timestep: bool = False
    timestep_name: str = "timestep"
    position: Literal["first", "middle", "last"] = "last"
    broadcast: Literal["ones", "expand", "none"] = "ones"
    width: int = 8
    flip: bool = False
    shift: float = 0.0
    scale: float = 1.0
    computed_frequencies: bool = True
    casts: bool = False
    asserts: bool = False
    blocks: int = 1
    scale_shift: bool = False
    activation: Literal["separate", "shared", "none"] = "separate"
    class_embedding: Literal["none", "table", "linear"] = "none"
    prompt: Literal["none", "plain", "linear"] = "none"
    return_embedding: bool = False
    read_features: bool = False
    read_batch: bool = False
    shape_decoy: bool = False
    linear_decoy: bool = False
    sinusoid_decoy: bool = False
    shared_weight_decoy: bool = False
    dead_branch: bool = False

    @property
    def timestep_dtype(self) -> torch.dtype:
        """The dtype of the timestep."""
        return torch.float32 if self.float_timestep else torch.int64


@dataclass(frozen=True)
class ExpectedBlock:
    """What ``find_temporal_block`` ought to find, as names of nodes.

    Attributes:
        nodes: All nodes of the block, the constants that only it reads included.
        time_embedding: The linears of ``h`` in order.
        embedding_layers: The linears of the ``g_i`` in order.
        features: The nodes of the block that the rest of the graph reads, in order.
    """

    nodes: frozenset[str]
    time_embedding: tuple[str, ...]
    embedding_layers: tuple[str, ...]
    features: tuple[str, ...]


@dataclass(frozen=True)
class ExpectedPart:
    """What ``find_conditional_part`` ought to find with ``sample`` as the sample, as names of nodes.

    Attributes:
        per_prompt: Tensors that depend on class labels and prompt alone.
        per_timestep: Tensors that depend on the timestep, with or without them.
        joint: The layers that depend on the timestep and on them, in order.
        conditions: The inputs that are not the timestep, in order.
    """

    per_prompt: frozenset[str]
    per_timestep: frozenset[str]
    joint: tuple[str, ...]
    conditions: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class TemporalGraph:
    """A generated diffusion model with its answer.

    Attributes:
        graph_module: The model.
        path: What it was built from.
        expected: The block of the timestep alone.
        expected_finite: The block with ``finite=("class_labels",)``; equal to ``expected`` without classes.
        expected_whole: The block with ``finite=("class_labels", "pooled")``, as far as they are inputs.
        expected_part: What the sample does not reach.
    """

    graph_module: fx.GraphModule
    path: TimePath
    expected: ExpectedBlock
    expected_finite: ExpectedBlock
    expected_whole: ExpectedBlock
    expected_part: ExpectedPart

    def example_inputs(self, timesteps: Sequence[float] = (7, 999), *, batch: int | None = None) -> tuple[Tensor, ...]:
        """Inputs of the model in the order of its placeholders.

        Args:
            timesteps: Given to the items of the batch in turn; a 0-dim timestep takes the first.
            batch: Another batch size, for a symbolic batch.
        """
        size = self.path.batch if batch is None else batch
        random = torch.Generator().manual_seed(self.path.seed)
        cycle = [timesteps[index % len(timesteps)] for index in range(size)]
        inputs = {
            "sample": torch.randn(size, CHANNELS, SIDE, SIDE, generator=random),
            self.path.timestep_name: torch.tensor(
                cycle[0] if self.path.scalar_timestep else cycle, dtype=self.path.timestep_dtype
            ),
            "class_labels": torch.arange(size) % 3,
            "pooled": torch.randn(size, _prompt_width(self.path), generator=random),
        }
        names = [str(node.target) for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        return tuple(inputs[name] for name in names)

    def __repr__(self) -> str:
        """The path and the readable graph, for the report of a failing example."""
        return f"TemporalGraph({self.path})\n{self.graph_module.graph}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints examples with this; for a dataclass it would write down every weight."""
        printer.text(repr(self))


def _prompt_width(path: TimePath) -> int:
    return PROMPT if path.prompt == "linear" else EMBEDDING


def build_temporal_graph(path: TimePath) -> TemporalGraph:
    """Build the model that ``path`` describes, and its answer."""
    return _Model(path).build()


class _Model:
    """Builds one model; ``temporal`` and ``finite`` collect the nodes of the block as they are made."""

    def __init__(self, path: TimePath) -> None:
        self.path = path
        self.builder = GraphBuilder(batch=path.batch, dynamic_batch=path.dynamic_batch, seed=path.seed)
        self.temporal: list[fx.Node] = []
        self.finite: list[fx.Node] = []
        self.prompted: list[fx.Node] = []
        self.without_timestep: list[fx.Node] = []
        self.constants: list[fx.Node] = []
        self.class_linears: list[fx.Node] = []
        self.prompt_linears: list[fx.Node] = []
        self.inputs = self._placeholders()
        self._batch_size: Any = None

    def _placeholders(self) -> dict[str, fx.Node]:
        others = ["sample", *["class_labels"] * (self.path.class_embedding != "none")]
        others += ["pooled"] * (self.path.prompt != "none")
        index = {"first": 0, "middle": 1, "last": len(others)}[self.path.position]
        names = [*others[:index], self.path.timestep_name, *others[index:]]
        batch = self.builder.batch
        shapes: dict[str, tuple[Any, ...]] = {"sample": (batch, CHANNELS, SIDE, SIDE), "class_labels": (batch,)}
        shapes["pooled"] = (batch, _prompt_width(self.path))
        shapes[self.path.timestep_name] = () if self.path.scalar_timestep else (batch,)
        dtypes = {"sample": torch.float32, "pooled": torch.float32, self.path.timestep_name: self.path.timestep_dtype}
        return {name: self.builder.placeholder(name, shapes[name], dtypes.get(name, torch.int64)) for name in names}

    def build(self) -> TemporalGraph:
        path, builder = self.path, self.builder
        sample = self.inputs["sample"]
        hidden = self._conv("conv_in", sample)
        features = self._sinusoid()
        with builder.inside("time_embedding"):
            first = self._linear(self.temporal, "time_embedding.linear_1", features, EMBEDDING, path.width)
            second = self._linear(
                self.temporal, "time_embedding.linear_2", self._t(aten.silu.default, first), EMBEDDING, EMBEDDING
            )
        labelled = self._add_classes(second) if path.class_embedding != "none" else second
        embedding = self._add_prompt(labelled) if path.prompt != "none" else labelled
        read_outside = self._readers(hidden, first, features, embedding)
        into = self.temporal if embedding is second else self.finite if embedding is labelled else self.prompted
        shared = self._record(into, aten.silu.default, embedding) if path.activation == "shared" else embedding
        layers, injected = [], []
        for index in range(path.blocks):
            with builder.inside(f"blocks.{index}"):
                hidden = self._conv(f"blocks.{index}.conv", builder.call(aten.silu.default, hidden))
                own = path.activation == "separate"
                source = self._record(into, aten.silu.default, embedding) if own else shared
                width = 2 * CHANNELS if path.scale_shift else CHANNELS
                layer = self._linear(into, f"blocks.{index}.emb", source, width, EMBEDDING)
                hidden, read = self._inject(into, hidden, layer)
            layers.append(layer)
            injected += read
        outputs = [self._conv("conv_out", hidden), *read_outside]
        if path.return_embedding:
            outputs.append(embedding)
        frontier = injected + [features] * path.read_features + [embedding] * path.return_embedding
        graph_module = builder.build(tuple(outputs) if len(outputs) > 1 else outputs[0])
        # What follows the inputs that a block may not depend on is not its own; it ends where they are added.
        linears = [first, second]
        ends = [features] * path.read_features
        inputs = [self.temporal, self.finite, self.prompted]
        answers = []
        for count, last in enumerate((second, labelled, embedding), start=1):
            members = [node for nodes in inputs[:count] for node in nodes]
            whole = last is embedding
            trunk = linears + self.class_linears * (count > 1) + self.prompt_linears * (count > 2)
            answers.append(self._answer(members, trunk, layers if whole else [], frontier if whole else [last, *ends]))
        alone, finite, everything = answers
        part = self._part(layers if embedding is not second else [])
        return TemporalGraph(graph_module, path, alone, finite, everything, part)

    def _part(self, joint: list[fx.Node]) -> ExpectedPart:
        alone = {node.name for node in self.without_timestep}
        reached = {node.name for node in (*self.temporal, *self.finite, *self.prompted)}
        return ExpectedPart(
            per_prompt=frozenset(alone),
            per_timestep=frozenset(reached - alone),
            joint=tuple(node.name for node in joint),
            conditions=tuple(name for name in self.inputs if name in ("class_labels", "pooled")),
        )

    # -- nodes of the block, of the constants, and of the rest ------------------------------------------------

    def _record(self, into: list[fx.Node], target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.builder.call(target, *args, **kwargs)
        into.append(node)
        return node

    def _t(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._record(self.temporal, target, *args, **kwargs)

    def _constant(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._record(self.constants, target, *args, **kwargs)

    def _weight(self, name: str, *shape: int) -> fx.Node:
        node = self.builder.weight(name, shape)
        self.constants.append(node)
        return node

    def _linear(self, into: list[fx.Node], name: str, source: fx.Node, width: int, fan_in: int) -> fx.Node:
        weight, bias = self._weight(f"{name}.weight", width, fan_in), self._weight(f"{name}.bias", width)
        return self._record(into, aten.linear.default, source, weight, bias)

    def _conv(self, name: str, source: fx.Node) -> fx.Node:
        weight = self.builder.weight(f"{name}.weight", (CHANNELS, CHANNELS, 3, 3))
        bias = self.builder.weight(f"{name}.bias", (CHANNELS,))
        with self.builder.inside(name):
            return self.builder.call(aten.conv2d.default, source, weight, bias, [1, 1], [1, 1])

    def _size(self) -> Any:
        """The batch size as the time path sees it: a number, or one node that reads it off the sample."""
        if not self.path.dynamic_batch:
            return self.path.batch
        if self._batch_size is None:
            self._batch_size = self._constant(aten.sym_size.int, self.inputs["sample"], 0)
        return self._batch_size

    # -- the time path ----------------------------------------------------------------------------------------

    def _sinusoid(self) -> fx.Node:
        """Timestep -> features ``[N, width]`` (``[1, width]`` for an unbroadcast 0-dim timestep)."""
        path = self.path
        with self.builder.inside("time_proj"):
            t = self.inputs[path.timestep_name]
            if path.dead_branch:
                self._t(aten.sin.default, t)
            if path.scalar_timestep:
                t = self._t(aten.unsqueeze.default, t, 0)
            if path.broadcast == "ones":
                t = self._t(
                    aten.mul.Tensor, t, self._constant(aten.ones.default, [self._size()], dtype=path.timestep_dtype)
                )
            elif path.broadcast == "expand":
                t = self._t(aten.expand.default, t, [self._size()])
            if path.asserts:
                # An assertion reads no data and nobody reads it, so it is no part of the block.
                self.builder.call(aten._assert_tensor_metadata.default, t, None, None, path.timestep_dtype)
            if path.casts:
                t = self._t(aten.to.dtype, t, path.timestep_dtype)
            column = self._t(aten.to.dtype, self._t(aten.unsqueeze.default, t, -1), torch.float32)
            argument = self._t(aten.mul.Tensor, column, self._frequencies())
            if path.scale != 1.0:
                argument = self._t(aten.mul.Tensor, argument, path.scale)
            waves = [self._t(aten.sin.default, argument), self._t(aten.cos.default, argument)]
            features = self._t(aten.cat.default, waves, -1)
            if path.flip:
                half = path.width // 2
                back = self._t(aten.slice.Tensor, features, 1, half)
                front = self._t(aten.slice.Tensor, features, 1, 0, half)
                features = self._t(aten.cat.default, [back, front], -1)
            if path.width % 2:
                features = self._t(aten.pad.default, features, [0, 1])
            if path.casts:
                features = self._t(aten.to.dtype, features, torch.float32)
            return features

    def _frequencies(self) -> fx.Node:
        half = self.path.width // 2
        rate = -9.210340371976184 / (half - self.path.shift)
        if not self.path.computed_frequencies:
            node = self.builder.buffer("frequencies", torch.exp(rate * torch.arange(half)))
            self.constants.append(node)
            return node
        steps = self._constant(aten.arange.default, half, dtype=torch.float32)
        return self._constant(aten.exp.default, self._constant(aten.mul.Tensor, steps, rate))

    def _add_classes(self, embedding: fx.Node) -> fx.Node:
        with self.builder.inside("class_embedding"):
            table = self._weight("class_embedding.weight", 3, EMBEDDING)
            label = self._record(self.finite, aten.embedding.default, table, self.inputs["class_labels"])
            self.without_timestep.append(label)
            if self.path.class_embedding == "linear":
                label = self._linear(self.finite, "class_embedding.linear", label, EMBEDDING, EMBEDDING)
                self.class_linears.append(label)
                self.without_timestep.append(label)
        return self._record(self.finite, aten.add.Tensor, embedding, label)

    def _add_prompt(self, embedding: fx.Node) -> fx.Node:
        pooled = self.inputs["pooled"]
        if self.path.prompt == "linear":
            with self.builder.inside("add_embedding"):
                pooled = self._linear(self.prompted, "add_embedding.linear", pooled, EMBEDDING, PROMPT)
            self.prompt_linears.append(pooled)
            self.without_timestep.append(pooled)
        return self._record(self.prompted, aten.add.Tensor, embedding, pooled)

    def _inject(self, into: list[fx.Node], hidden: fx.Node, layer: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Bring what a ``g_i`` computes into the feature map; return the map and the features it reads."""
        call = self.builder.call
        column = self._record(into, aten.unsqueeze.default, layer, -1)
        pixel = self._record(into, aten.unsqueeze.default, column, -1)
        if not self.path.scale_shift:
            return call(aten.add.Tensor, hidden, pixel), [pixel]
        halves = self._record(into, aten.chunk.default, pixel, 2, 1)
        scale, shift = (self._record(into, operator.getitem, halves, index) for index in (0, 1))
        factor = self._record(into, aten.add.Tensor, scale, 1)
        return call(aten.add.Tensor, call(aten.mul.Tensor, hidden, factor), shift), [shift, factor]

    # -- readers outside the block, and decoys ----------------------------------------------------------------

    def _readers(self, hidden: fx.Node, first: fx.Node, features: fx.Node, embedding: fx.Node) -> list[fx.Node]:
        path, call = self.path, self.builder.call
        pooled = call(aten.mean.dim, hidden, [2, 3])
        outputs = []
        if path.read_features:
            outputs.append(call(aten.add.Tensor, call(aten.mean.dim, pooled, [-1], True), features))
        if path.read_batch and path.dynamic_batch:
            outputs.append(call(aten.add.Tensor, pooled, call(aten.ones.default, [self._size(), CHANNELS])))
        if path.shape_decoy:
            outputs.append(call(aten.type_as.default, pooled, embedding))
        if path.linear_decoy:
            weight = self.builder.weight("decoy.weight", (EMBEDDING, CHANNELS))
            outputs.append(call(aten.linear.default, call(aten.silu.default, pooled), weight))
        if path.sinusoid_decoy:
            positions = call(aten.sin.default, call(aten.arange.default, CHANNELS, dtype=torch.float32))
            wave = call(aten.add.Tensor, call(aten.sin.default, pooled), call(aten.cos.default, pooled))
            outputs.append(call(aten.add.Tensor, wave, positions))
        if path.shared_weight_decoy and path.width == CHANNELS:
            outputs.append(call(aten.linear.default, pooled, first.args[1]))
        return outputs

    def _answer(
        self, members: list[fx.Node], trunk: list[fx.Node], layers: list[fx.Node], frontier: list[fx.Node]
    ) -> ExpectedBlock:
        # A constant belongs to the block when the block alone reads it; the latest come first, because
        # constants may be computed from constants.
        inside = set(members)
        for constant in reversed(self.constants):
            if constant.users and all(user in inside for user in constant.users):
                inside.add(constant)
        order = {node: index for index, node in enumerate(self.builder.graph.nodes)}
        return ExpectedBlock(
            nodes=frozenset(node.name for node in inside),
            time_embedding=tuple(node.name for node in trunk),
            embedding_layers=tuple(node.name for node in layers),
            features=tuple(node.name for node in sorted(set(frontier), key=order.__getitem__)),
        )
