"""Search bit widths: measure every layer, solve, quantize with what was found, and compare."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.config.reconstruction import RECONSTRUCTIONS
from tfmq_fx.errors import CalibrationError, ConfigError
from tfmq_fx.frontend.batches import Batch, as_batches, batch_arguments
from tfmq_fx.frontend.capture import capture
from tfmq_fx.frontend.export_inputs import Batched
from tfmq_fx.frontend.surroundings import pipeline_stage
from tfmq_fx.passes.analysis import find_temporal_block
from tfmq_fx.quantization.calibrate import calibrate
from tfmq_fx.quantization.convert import convert
from tfmq_fx.quantization.prepare import prepare
from tfmq_fx.quantization.probes import measure
from tfmq_fx.quantization.program import QuantizedProgram
from tfmq_fx.quantization.quantizer_options import schedule_values
from tfmq_fx.search.budget import Budget
from tfmq_fx.search.held_back import hold_back
from tfmq_fx.search.latency import StepTimer, layer_times
from tfmq_fx.search.layers import find_layers
from tfmq_fx.search.operand_quantizers import OperandQuantizers
from tfmq_fx.search.result import Measured, SearchResult
from tfmq_fx.search.rounding import round_weights
from tfmq_fx.search.sensitivity import Sensitivities, measure_sensitivities
from tfmq_fx.search.sizes import artefact_bytes, float_bytes, layer_bytes
from tfmq_fx.search.tradeoff import Choice, Tradeoff
from tfmq_fx.search.widths import BASE, DEFAULT_CANDIDATES, check_candidates
from tfmq_fx.temporal.inputs import FiniteInputs
from tfmq_fx.workflow.quantize import quantize

__all__ = ["search_bits"]

log = logging.getLogger(__name__)


@pipeline_stage
def search_bits(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    budget: Budget | str,
    batches: Iterable[Batch],
    *,
    config: QuantizationConfig | None = None,
    candidates: Sequence[str] | str = DEFAULT_CANDIDATES,
    timesteps: Tensor | Iterable[float] | None = None,
    timestep: str = "timestep",
    finite: FiniteInputs = (),
    batched: Batched | None = None,
    progress: bool = True,
) -> SearchResult:
    """Choose the bit widths of every layer by what it does to the prediction, under a budget.

    One item of every timestep is kept back. On the others one model is calibrated, and the weights that are tried at 6
    bits or fewer are rounded by GPTQ, unless the configuration rounds to nearest. Then each layer alone is quantized at
    each width, all others in float, and the predictions for the items that were kept back are compared with the float
    ones. Errors are taken to add up, an integer program is solved, and the model is quantized with what came out: what
    was measured of that stands beside what was predicted.

    Args:
        model: What :func:`tfmq_fx.capture` takes.
        budget: ``"size=0.2x"``: the artefact has at most this share of the float model's bytes; ``"latency=1.1x"``: a
            step takes at most this many times as long as with the first candidate everywhere, by the times of the
            layers alone on this machine. The error is made least. ``"psnr=40"``: the predictions have this PSNR to the
            float ones at least, in dB; the size is made least.
        batches: Calibration batches, several items of each timestep.
        config: Everything but the widths; layers that its ``overrides`` name keep theirs.
        candidates: Widths to choose from, ``"w8a8"`` first: such as ``("w8a8", "w6a8", "w4a8", "float")``. Products of
            attention have widths of activations alone; float takes no bytes there, only time, so under a budget of size
            they have those of the first candidate.
        timesteps: The timesteps of the schedule (``scheduler.timesteps``).
        timestep: Name of the model's timestep input.
        finite: Further inputs from a finite set (:func:`tfmq_fx.prepare`).
        batched: The names of the inputs that have the batch, as for :func:`tfmq_fx.capture`.
        progress: Whether to draw progress bars, where stderr is a terminal.

    Returns:
        What was found: ``result.config`` quantizes any time again, ``result.program`` is quantized with it.

    Raises:
        ConfigError: The budget cannot be met, and the message says what can be; or it, the candidates or the
            configuration are not usable.
        CalibrationError: The batches do not fit, or there are too few items to keep one back.
        CaptureError: The model cannot be captured.

    Source: HAWQ-V3 (Yao et al., ICML 2021) for the integer program; what a layer loses is measured here.
    """
    wanted, widths = Budget.of(budget), check_candidates(candidates)
    chosen = _checked(QuantizationConfig.of(config), widths)
    batches = list(as_batches(batches))
    if not batches:
        msg = "the search got no batches; pass batches of the model's own inputs, several items of each timestep"
        raise CalibrationError(msg)
    args, kwargs = batch_arguments(batches[0])
    program = capture(model, args, example_kwargs=kwargs, batched=batched, timestep=timestep)
    served = None if timesteps is None else schedule_values(timesteps)
    rest, probes = hold_back(program, batches, timestep, served)
    log.info("calibrating on %d batches, %d items kept back", len(rest), len(probes))
    prepared = prepare(program, chosen, timesteps=served, timestep=timestep, finite=finite)
    calibrate(prepared, rest, progress=progress)
    layers = tuple(find_layers(prepared, chosen, timestep, widths, products=wanted.measure != "size"))
    quantizers = OperandQuantizers(prepared, chosen)
    method = chosen.reconstruction or RECONSTRUCTIONS["gptq"]
    if method.method != "nearest":
        round_weights(prepared, layers, quantizers, rest, timestep, method, progress=progress)
    sensitivities = measure_sensitivities(prepared, layers, quantizers, probes, progress=progress)
    base, sizes = convert(prepared), layer_bytes(layers, quantizers)
    size = artefact_bytes(base)
    tradeoff = Tradeoff(
        layers=layers,
        sensitivities=sensitivities,
        sizes=tuple(sizes),
        float_size=float_bytes(program),
        other_size=size - sum(int(own[0]) for own in sizes),
    )
    timer = StepTimer(*sensitivities.probes[0].call.arguments())
    if wanted.measure == "latency":
        block = find_temporal_block(prepared, timestep, finite=tuple(finite))
        times = layer_times(layers, block, progress=progress)
        timer.add("base", base)
        tradeoff = dataclasses.replace(tradeoff, times=times, base_seconds=timer.seconds()["base"])
    choice = tradeoff.solve(wanted)
    found = _configuration(chosen, tradeoff, choice)
    quantized = quantize(program, found, rest, timesteps=served, timestep=timestep, finite=finite, progress=progress)
    taken: dict[str, float] = {}
    if wanted.measure == "latency":
        timer.add("found", quantized)
        taken = timer.seconds()
    return SearchResult(
        budget=wanted,
        config=found,
        program=quantized,
        tradeoff=tradeoff,
        choice=choice,
        measured=_measured(quantized, artefact_bytes(quantized), taken.get("found"), sensitivities),
        base=_measured(base, size, taken.get("base"), sensitivities),
        frontier=tuple(tradeoff.frontier(wanted)),
        uniform={str(each): tradeoff.uniform(each) for each in widths},
    )


def _checked(config: QuantizationConfig, candidates: Sequence[Any]) -> QuantizationConfig:
    """The configuration, which leaves its widths to the search.

    Raises:
        ConfigError: It does not, or it has what the search does not know.
    """
    if (config.weight_bits, config.activation_bits) != (BASE.weight_bits, BASE.activation_bits):
        msg = (
            f"the configuration has W{config.weight_bits}A{config.activation_bits}, but widths are what the search "
            "chooses: leave weight_bits and activation_bits out, and name candidates"
        )
        raise ConfigError(msg)
    if candidates[0] != BASE:
        msg = f"the first candidate is {candidates[0]}: begin with {BASE}, which the others are compared with"
        raise ConfigError(msg)
    if config.low_rank is not None or any("low_rank" in values for values in config.overrides.values()):
        msg = "the search does not weigh branches of low rank: leave low_rank out"
        raise ConfigError(msg)
    return config


def _configuration(config: QuantizationConfig, tradeoff: Tradeoff, choice: Choice) -> QuantizationConfig:
    """The configuration with the chosen widths as overrides, behind those that it has."""
    found = dict(config.overrides)
    for layer, option in zip(tradeoff.layers, choice.options, strict=True):
        if layer.options[option] != BASE and len(layer.options) > 1:
            name, values = layer.override(layer.options[option])
            found[name] = values
    return dataclasses.replace(config, overrides=found)


def _measured(program: QuantizedProgram, size: int, seconds: float | None, sensitivities: Sensitivities) -> Measured:
    fidelity = measure(program.graph_module, sensitivities.probes)
    assert fidelity is not None
    return Measured(size, seconds, fidelity)
