"""The calls that a pipeline is calibrated with: prompts, seeds and further arguments, checked before anything runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tfmq_fx.errors import ConfigError, TfmqError

__all__ = ["DEFAULT_CALLS", "PipelineCalls"]

#: Calls without prompts: each has a noise of its own.
DEFAULT_CALLS = 4
#: Arguments that :class:`PipelineCalls` gives itself, and what asks for them.
OWN = {"prompt": "prompts=", "num_inference_steps": "steps=", "generator": "seed="}


class PipelineCalls:
    """A fixed number of seeded calls of a pipeline.

    Args:
        pipeline: A diffusers pipeline.
        prompts: One call each, or a single one; None leaves the prompt out, or to ``arguments``.
        calls: The number of calls; None is one a prompt, or :data:`DEFAULT_CALLS`. More calls than prompts take turns.
        steps: ``num_inference_steps``; None is the pipeline's own default.
        seed: The first call's; each next one has the next seed.
        arguments: What every call gets besides.
        decodes: Whether results have to be decoded; otherwise pipelines are asked for latents, which takes less time.

    Raises:
        ConfigError: The pipeline does not take an argument, or a value is not usable.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str] | str | None,
        calls: int | None,
        steps: int | None,
        seed: int,
        arguments: Mapping[str, Any],
        *,
        decodes: bool,
    ) -> None:
        self._pipeline, self._name = pipeline, type(pipeline).__name__
        signature = inspect.signature(type(pipeline).__call__)
        taken = {name: p for name, p in signature.parameters.items() if name != "self"}
        self._taken = {name for name, p in taken.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        # Beside arguments with names, diffusers' pipelines have others only for what they no longer take.
        self._any = not self._taken
        self.prompts, self.seed = self._checked_prompts(prompts), seed
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            msg = f"seed={seed!r} must be a whole number of at least 0"
            raise ConfigError(msg)
        for name, value in {"calls": calls, "steps": steps}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                msg = f"{name}={value!r} must be a whole number of at least 1"
                raise ConfigError(msg)
        self.count = calls or len(self.prompts) or DEFAULT_CALLS
        self._arguments = dict(self._given(arguments))
        if steps is not None:
            self._require("num_inference_steps", "steps=")
            self._arguments["num_inference_steps"] = steps
        if self.prompts:
            self._require("prompt", "prompts=")
        if not decodes and "output_type" in self._taken and getattr(pipeline, "vae", None) is not None:
            self._arguments.setdefault("output_type", "latent")

    def _checked_prompts(self, prompts: Any) -> list[str]:
        if prompts is None:
            return []
        if isinstance(prompts, str):
            prompts = [prompts]
        if not (isinstance(prompts, Sequence) and prompts and all(isinstance(prompt, str) for prompt in prompts)):
            msg = f"prompts={prompts!r} must be strings, at least one; leave it out for a pipeline without prompts"
            raise ConfigError(msg)
        return list(prompts)

    def _require(self, name: str, given: str) -> None:
        if not self._any and name not in self._taken:
            msg = f"{self._name} takes no {name!r}: leave {given} out"
            raise ConfigError(msg)

    def _given(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in arguments:
            if name in OWN and (name != "prompt" or self.prompts):
                msg = f"{name}= is given by {OWN[name]} here: leave it out"
                raise ConfigError(msg)
            if not self._any and name not in self._taken:
                near = difflib.get_close_matches(name, self._taken, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                msg = f"{self._name} takes no {name!r}{hint}"
                raise ConfigError(msg)
        return arguments

    def run(self, index: int) -> Any:
        """The call with this number, from 0, and what it returns."""
        arguments = dict(self._arguments)
        if self._any or "generator" in self._taken:
            arguments["generator"] = torch.Generator().manual_seed(self.seed + index)
        if self.prompts:
            arguments["prompt"] = self.prompts[index % len(self.prompts)]
        try:
            return self._pipeline(**arguments)
        except TfmqError:
            raise
        except (ValueError, TypeError, IndexError) as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            msg = f"{self._name} does not take this call: {first}"
            raise ConfigError(msg) from error
