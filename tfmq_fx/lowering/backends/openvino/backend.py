"""OpenVINO as a backend; its package is imported when it is used."""

from __future__ import annotations

import copy

from torch import fx

from tfmq_fx._torch.processor import sums_bytes_exactly
from tfmq_fx.lowering.report.matching import in_float
from tfmq_fx.lowering.report.reasons import NO_EXACT_BYTES
from tfmq_fx.lowering.report.report import ReportEntry
from tfmq_fx.lowering.run.by_batch import ByBatch
from tfmq_fx.lowering.translation.backend import Translated, TranslatingBackend
from tfmq_fx.passes import DequantizeWeights, HoistQuantizers, StripDeadState
from tfmq_fx.passes.support.predicates import is_weighted

__all__ = ["OpenVINOBackend"]


class OpenVINOBackend(TranslatingBackend):
    """Builds an OpenVINO model with its quantizers where OpenVINO's low precision transformations look for them."""

    name, title = "openvino", "OpenVINO"
    summary = "an OpenVINO model in OpenVINO"
    requires, extra = ("openvino",), "tfmq-fx[openvino]"

    @property
    def precisions(self) -> tuple[str, ...]:
        """``"f32"``, and ``"bf16"`` for those who ask for it."""
        return ("f32", "bf16")

    def rewrite(
        self, graph_module: fx.GraphModule, entries: tuple[ReportEntry, ...], *, one_group: bool
    ) -> tuple[ReportEntry, ...]:
        """As every translation; where the engine's sums of bytes would saturate it computes in float."""
        rewritten = super().rewrite(graph_module, entries, one_group=one_group)
        if sums_bytes_exactly():
            return rewritten
        DequantizeWeights(is_weighted)(graph_module)
        StripDeadState()(graph_module)
        return in_float(rewritten, NO_EXACT_BYTES)

    def translate(self, graph_module: fx.GraphModule, batch: int, precision: str) -> Translated:
        """Compile for one batch size; others follow when they come."""
        from tfmq_fx.lowering.backends.openvino.kernels import integer_layers
        from tfmq_fx.lowering.backends.openvino.session import OpenVINOSession
        from tfmq_fx.lowering.backends.openvino.translator import OpenVINOTranslator

        prepared = _with_hoisted_quantizers(graph_module)
        run = ByBatch(prepared, lambda size: OpenVINOSession(OpenVINOTranslator(prepared, size).model(), precision))
        session = run.session(batch)
        assert isinstance(session, OpenVINOSession)
        return run, integer_layers(session.compiled)


def _with_hoisted_quantizers(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in the form that the engine compiles best; it shares its weights."""
    shared = {id(tensor): tensor for tensor in (*graph_module.parameters(), *graph_module.buffers())}
    copied: fx.GraphModule = copy.deepcopy(graph_module, shared)
    HoistQuantizers()(copied)
    return copied
