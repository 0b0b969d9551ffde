"""The parts of a pipeline that can be quantized: its denoisers, and the decoder of its autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from tfmq_fx.errors import ConfigError, UnsupportedError
from tfmq_fx.lowering.lower import lower as lower_program
from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["Component", "find_components"]

#: Names under which pipelines hold a denoiser; a pipeline may have two of them.
DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
#: Names under which denoisers take their timestep.
TIMESTEPS = ("timestep", "timesteps", "timestep_ratio", "t", "r", "sigma")
AUTOENCODERS = ("vae", "vqvae", "movq", "vqgan")


@dataclass(frozen=True)
class Component:
    """A part of a pipeline, by its name there.

    Attributes:
        name: Its name: ``"unet"``, ``"vae"`` …
        module: What is called, recorded and quantized; of an autoencoder its decoder.
        timestep: Name of its timestep argument; None where it has none.
        place: Puts a quantized program in its place.
    """

    name: str
    module: nn.Module
    timestep: str | None
    place: Callable[[QuantizedProgram, str | None], None]


def find_components(pipeline: Any, names: Sequence[str] | None, timestep: str | None) -> list[Component]:
    """The parts that are asked for.

    Args:
        pipeline: A diffusers pipeline.
        names: Their names; None is every denoiser.
        timestep: Name of the denoisers' timestep argument; None looks for a usual one.

    Raises:
        ConfigError: There is no such part, or no denoiser, or its timestep is not found.
    """
    held = getattr(pipeline, "components", None)
    if not isinstance(held, dict):
        msg = f"quantize_pipeline needs a diffusers pipeline, it was given a {type(pipeline).__name__}"
        raise ConfigError(msg)
    modules = {name: module for name, module in held.items() if isinstance(module, nn.Module)}
    if isinstance(names, str):
        names = (names,)
    chosen = [name for name in DENOISERS if _is_denoiser(modules.get(name))] if names is None else list(names)
    if not chosen:
        has = ", ".join(map(repr, modules)) or "none"
        msg = f"{type(pipeline).__name__} has no denoiser under a usual name; name it with components=: it has {has}"
        raise ConfigError(msg)
    if len(set(chosen)) < len(chosen):
        msg = f"components={tuple(chosen)!r} names a component twice"
        raise ConfigError(msg)
    return [_component(pipeline, modules, name, timestep) for name in chosen]


def _is_denoiser(module: nn.Module | None) -> bool:
    return module is not None and _timestep_of(module) is not None


def _timestep_of(module: nn.Module) -> str | None:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in TIMESTEPS if name in parameters), None)


def _component(pipeline: Any, modules: dict[str, nn.Module], name: str, timestep: str | None) -> Component:
    if name not in modules:
        msg = f"{type(pipeline).__name__} has no module {name!r}; it has {', '.join(map(repr, modules)) or 'none'}"
        raise ConfigError(msg)
    module = modules[name]
    decoder = getattr(module, "decoder", None)
    if isinstance(decoder, nn.Module) and hasattr(module, "decode"):
        return Component(name, decoder, None, lambda program, lower: _place_decoder(module, name, program, lower))
    if not _is_denoiser(module) and timestep is None:
        msg = (
            f"{name!r} ({type(module).__name__}) is neither a denoiser nor an autoencoder: leave it out of "
            "components=, or name its timestep argument with timestep="
        )
        raise ConfigError(msg)
    if timestep is not None and timestep not in inspect.signature(module.forward).parameters:
        msg = f"{name!r} ({type(module).__name__}) takes no {timestep!r}; leave timestep= out or name another argument"
        raise ConfigError(msg)
    known = timestep or _timestep_of(module)
    return Component(name, module, known, lambda program, lower: _place(pipeline, name, type(module), program, lower))


def _place(pipeline: Any, name: str, model_class: type, program: QuantizedProgram, lower: str | None) -> None:
    from tfmq_fx.diffusers.convert import to_diffusers

    # By its class: those that only a pipeline's own folder exports are not found by their name.
    pipeline.register_modules(**{name: to_diffusers(program, lower, model_class=model_class)})


def _place_decoder(autoencoder: Any, name: str, program: QuantizedProgram, lower: str | None) -> None:
    autoencoder.decoder = lower_program(program, lower or "inductor")
    kind = type(autoencoder).__name__

    def save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
        msg = (
            f"the decoder of this {kind} is quantized and cannot be saved with its float encoder; save the program "
            f"itself (tfmq_fx.save), or the pipeline with its float {name!r}"
        )
        raise UnsupportedError(msg)

    # On this one: saved as it is, its folder would lack the decoder without a word.
    autoencoder.save_pretrained = save_pretrained
