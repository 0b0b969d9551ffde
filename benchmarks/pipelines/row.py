"""A row of the matrix: a tiny pipeline of diffusers' real classes with random weights, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Row", "noise"]


def noise(*shape: int, seed: int = 7) -> Tensor:
    """Standard normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Row:
    """A pipeline that is built without a download, and calls of it that need no tokenizer.

    Attributes:
        name: What the table calls it.
        make: Builds the float pipeline; random numbers are seeded before.
        arguments: Of every call, but for the generator and the number of steps: with guidance where there is one.
        batch: What makes a call one of three results.
        other_scheduler: From a pipeline, a scheduler of another class (or another configuration, where the pipeline
            takes one class alone); None where the pipeline cannot have another one.
        steps: Steps that it is quantized over.
        other_steps: Steps that it was not quantized over.
        options: Of ``quantize_pipeline``.
        loading: Of ``from_pretrained``.
    """

    name: str
    make: Callable[[], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch: Mapping[str, Any] = field(default_factory=lambda: {"num_images_per_prompt": 3})
    other_scheduler: Callable[[Any], Any] | None = None
    steps: int = 3
    other_steps: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)

    def pipeline(self) -> Any:
        """The float pipeline, the same each time."""
        torch.manual_seed(0)
        pipeline = self.make()
        pipeline.set_progress_bar_config(disable=True)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.eval()
        return pipeline

    def absent(self, pipeline: Any) -> dict[str, None]:
        """The components that it was made without: ``from_pretrained`` has to be told of them."""
        return {name: None for name, module in pipeline.components.items() if module is None}

    def sample(self, pipeline: Any, **arguments: Any) -> Tensor:
        """Images, frames or sound of one call, as one tensor of floats."""
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": self.steps, "generator": generator, **self.arguments, **arguments}
        result = pipeline(**given)[0]
        parts = [torch.as_tensor(part) for part in result] if isinstance(result, list) else [torch.as_tensor(result)]
        return torch.stack(parts).double()
