"""Small diffusion models in ATen ops whose temporal block is known because it was built as such.

:class:`TimePath` says what the model looks like, :func:`build_temporal_graph` builds it. The expected
block is noted down while the nodes are made, never computed from the finished graph: it is an oracle
for ``find_temporal_block`` and ``find_conditional_part`` that shares no code with them.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from .temporal_graph import TemporalGraph
from .temporal_recorder import TemporalRecorder
from .time_path import CHANNELS, EMBEDDING, PROMPT, TimePath

__all__ = ["build_temporal_graph"]

aten = torch.ops.aten


def build_temporal_graph(path: TimePath) -> TemporalGraph:
    """Build the model that ``path`` describes, and its answer."""
    return _Model(path).build()


class _Model(TemporalRecorder):
    """Builds one model."""

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
        collection = self.temporal if embedding is second else self.finite if embedding is labelled else self.prompted
        shared = self._record(collection, aten.silu.default, embedding) if path.activation == "shared" else embedding
        layers, injected = [], []
        for index in range(path.blocks):
            with builder.inside(f"blocks.{index}"):
                hidden = self._conv(f"blocks.{index}.conv", builder.call(aten.silu.default, hidden))
                own = path.activation == "separate"
                source = self._record(collection, aten.silu.default, embedding) if own else shared
                width = 2 * CHANNELS if path.scale_shift else CHANNELS
                layer = self._linear(collection, f"blocks.{index}.emb", source, width, EMBEDDING)
                hidden, read = self._inject(collection, hidden, layer)
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

    def _inject(self, collection: list[fx.Node], hidden: fx.Node, layer: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Bring what a ``g_i`` computes into the feature map; return the map and the features it reads."""
        call = self.builder.call
        column = self._record(collection, aten.unsqueeze.default, layer, -1)
        pixel = self._record(collection, aten.unsqueeze.default, column, -1)
        if not self.path.scale_shift:
            return call(aten.add.Tensor, hidden, pixel), [pixel]
        halves = self._record(collection, aten.chunk.default, pixel, 2, 1)
        scale, shift = (self._record(collection, operator.getitem, halves, index) for index in (0, 1))
        factor = self._record(collection, aten.add.Tensor, scale, 1)
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
