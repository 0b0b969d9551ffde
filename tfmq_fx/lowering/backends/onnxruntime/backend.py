"""ONNX Runtime as a backend; its packages are imported when it is used."""

from __future__ import annotations

from torch import fx

from tfmq_fx.lowering.run.by_batch import ByBatch
from tfmq_fx.lowering.translation.backend import Translated, TranslatingBackend

__all__ = ["OnnxRuntimeBackend"]


class OnnxRuntimeBackend(TranslatingBackend):
    """Builds an ONNX model whose layers multiply integers."""

    name, title = "onnxruntime", "ONNX Runtime"
    summary = "an ONNX model in ONNX Runtime"
    requires, extra = ("onnxruntime", "onnx"), "tfmq-fx[onnxruntime]"

    @property
    def precisions(self) -> tuple[str, ...]:
        """``"f32"`` alone."""
        return ("f32",)

    def translate(self, graph_module: fx.GraphModule, batch: int, precision: str) -> Translated:
        """Compile for one batch size; others follow when they come."""
        from tfmq_fx.lowering.backends.onnxruntime.session import OnnxSession
        from tfmq_fx.lowering.backends.onnxruntime.translator import OnnxTranslator

        run = ByBatch(graph_module, lambda size: OnnxSession(OnnxTranslator(graph_module, size).model()))
        session = run.session(batch)
        assert isinstance(session, OnnxSession)
        return run, session.integer_layers()
