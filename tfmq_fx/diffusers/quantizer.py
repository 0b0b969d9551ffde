"""What ``from_pretrained`` calls while it loads a model that we saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffusers.quantizers.base import DiffusersQuantizer

from tfmq_fx.diffusers.registration import announce
from tfmq_fx.errors import ArtefactError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tfmq_fx.diffusers.configuration import TFMQConfig
    from tfmq_fx.quantization.program import QuantizedProgram

__all__ = ["TFMQDiffusersQuantizer"]

#: What a call of ours looks like where diffusers has nothing to say.
UNKNOWN: Any = object()


class TFMQDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # diffusers has no types
    """Loads the artefact beside ``config.json`` and makes the skeleton that diffusers built compute with it.

    diffusers makes it, from the ``quantization_config`` of a folder or of a call, and calls it in this order:
    ``validate_environment``, ``update_torch_dtype``, ``update_device_map``, ``maybe_update_loaded_keys``,
    ``preprocess_model``, ``update_missing_keys``, ``postprocess_model``.

    Raises:
        ConfigError: The folder holds float weights: quantizing takes calibration data, which loading has not.
    """

    requires_calibration = True
    required_packages = ("accelerate",)

    def __init__(self, quantization_config: TFMQConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            _refuse_float_weights()
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype | None = None
        self._loaded: tuple[Path, QuantizedProgram] | None = None

    def validate_environment(self, *, torch_dtype: Any = UNKNOWN, device_map: Any = UNKNOWN, **kwargs: Any) -> None:
        """Refuse what cannot be, before a model is made.

        Raises:
            ConfigError: A single file of weights is loaded, or the configuration names no backend.
            LoweringError: The backend is not installed.
            UnsupportedError: accelerate is missing, or another device is asked for.
        """
        from tfmq_fx.diffusers.skeleton import check_accelerate

        if torch_dtype is UNKNOWN and device_map is UNKNOWN:
            _refuse_float_weights()  # from_single_file says nothing, and takes float weights for quantized ones
        check_accelerate()
        self.quantization_config.check_lowering()
        if device_map is not UNKNOWN:
            self.update_device_map(device_map)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep the dtype that is asked for, which the program has to have."""
        self._dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: Any) -> None:
        """No map: the program runs on the CPU, where diffusers has nothing to place.

        Raises:
            UnsupportedError: Another device is asked for.
        """
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            if place is not None and str(place) != "cpu":
                msg = f"a quantized model runs on the CPU: leave device_map={str(place)[:60]!r} out, or pass 'cpu'"
                raise UnsupportedError(msg)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Load the program.

        Raises:
            ArtefactError: It is missing, damaged, foreign, or not what ``config.json`` says.
            UnsupportedError: It is of another dtype than was asked for.
        """
        from tfmq_fx.diffusers.configuration import TFMQConfig
        from tfmq_fx.diffusers.folder import load_program

        folder, program = load_program(checkpoint_files, loaded_keys)
        quantized = TFMQConfig(**program.config.to_dict())
        if self.quantization_config.given != quantized.given:
            msg = (
                f"{folder}: quantization_config in config.json is not what the program was quantized with; copy or "
                "save the model again"
            )
            raise ArtefactError(msg)
        dtype = program.interface.dtype
        if self._dtype is not None and self._dtype != dtype:
            msg = (
                f"{folder} was quantized in {dtype} and cannot be loaded in {self._dtype}: pass torch_dtype={dtype}, "
                "or quantize the float model in the other dtype"
            )
            raise UnsupportedError(msg)
        self._loaded = folder, program
        return loaded_keys

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """None is missing: the weights are in the program."""
        return []

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Hold the program against the skeleton."""
        from tfmq_fx.diffusers.skeleton import check_same_model

        if self._loaded is None:
            _refuse_float_weights()
        folder, program = self._loaded
        check_same_model(model, program.interface, str(folder))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Make the skeleton compute with the program."""
        from tfmq_fx.diffusers.load_lowered import lower_at_load
        from tfmq_fx.diffusers.model import serve_
        from tfmq_fx.diffusers.served import ServedProgram

        assert self._loaded is not None
        (folder, program), self._loaded = self._loaded, None  # the model holds it from now on
        serve_(model, ServedProgram(program, lower_at_load(program, folder, self.quantization_config)))

    @property
    def is_serializable(self) -> bool:
        """The model saves itself, as an artefact."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integers have no gradients."""
        return False


def _refuse_float_weights() -> NoReturn:
    msg = (
        "TFMQConfig loads a model that was quantized and saved, and these are float weights: loading has no "
        "calibration data to quantize them with; load the pipeline without it, quantize its model "
        "(tfmq_fx.record_trajectories, tfmq_fx.quantize), put it in place (pipe.unet = "
        "tfmq_fx.diffusers.to_diffusers(quantized)) and save the pipeline"
    )
    raise ConfigError(msg)


announce()  # again, for whoever imported this before diffusers
