"""Our configuration as diffusers knows configurations: what a model was quantized with, and how to run it here."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from tfmq_fx.diffusers.registration import QUANT_METHOD, announce
from tfmq_fx.errors import ConfigError

__all__ = ["QuantMethod", "TFMQConfig"]

#: What is chosen where a model is loaded, and stands in no file.
LOADING_OPTIONS = ("lower", "precision")


class QuantMethod(StrEnum):
    """The name of our method, as an enumeration, as diffusers' own are."""

    TFMQ = QUANT_METHOD


class TFMQConfig(QuantizationConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """For ``from_pretrained(..., quantization_config=…)``: load a model that was quantized, saved and is checked.

    Loading has no calibration data, so it quantizes nothing: a folder of float weights is refused. Without this
    configuration such a model is loaded too, and compiled when it is first called.

    Args:
        lower: The backend that it is lowered to while it is loaded, as for :func:`tfmq_fx.lower`: ``"inductor"``,
            ``"openvino"``, ``"reference"`` … ``"aot"`` runs the compiled package beside the weights if there is one for
            this program and machine, else it compiles one and leaves it there. A package is a program: ask for
            ``"aot"`` only with folders whose compiled code you would run. None is Inductor, at the first call.
        precision: What passes between integer kernels, as for :func:`tfmq_fx.lower`.
        quant_method: The name of the method, which diffusers' files hold.
        **fields: Fields of :class:`tfmq_fx.QuantizationConfig`. Where a model is loaded they are held against what it
            was quantized with.

    Raises:
        ConfigError: A field or backend is unknown, or a value is not valid.
    """

    quant_method: QuantMethod

    def __init__(
        self,
        lower: str | None = None,
        precision: str | None = None,
        *,
        quant_method: str = QUANT_METHOD,
        **fields: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            msg = f"quant_method={str(quant_method)[:60]!r} is not {QUANT_METHOD!r}; leave it out"
            raise ConfigError(msg)
        self.quant_method = QuantMethod.TFMQ
        self.lower, self.precision = lower, precision
        self._fields = _checked(fields)
        self.check_lowering()

    def check_lowering(self) -> None:
        """Find out whether there is such a backend here, and it has the precision.

        Raises:
            ConfigError: There is none.
            LoweringError: It is not installed, or has not the precision.
        """
        if self.lower is None:
            if self.precision is not None:
                msg = f"precision={self.precision!r} goes with lower=: name the backend that has it"
                raise ConfigError(msg)
            return
        from tfmq_fx.lowering.backends.registry import backend_names, find_backend

        if self.lower not in backend_names():
            msg = f"lower={self.lower!r} is no backend: use one of {', '.join(map(repr, backend_names()))}"
            raise ConfigError(msg)
        find_backend(self.lower).resolve_precision(self.precision)

    @property
    def given(self) -> dict[str, Any]:
        """The fields of :class:`tfmq_fx.QuantizationConfig` that were given, as JSON values."""
        return dict(self._fields)

    @classmethod
    def of_program(cls, values: Mapping[str, Any]) -> TFMQConfig:
        """The configuration of a quantized program, from ``QuantizationConfig.to_dict()``."""
        return cls(**values)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers reads it from ``config.json``.

        Raises:
            ConfigError: A field is unknown or not valid, or the file chooses what runs here.
        """
        if chosen := [name for name in LOADING_OPTIONS if name in config_dict]:
            # Whoever wrote the file would decide whether its compiled code runs.
            msg = (
                f"a file cannot choose {chosen[0]!r}; remove it from quantization_config, and pass "
                f"quantization_config=TFMQConfig({chosen[0]}=...) where the model is loaded"
            )
            raise ConfigError(msg)
        return super().from_dict(dict(config_dict), return_unused_kwargs, **kwargs)

    def loaded_with(self, other: TFMQConfig) -> TFMQConfig:
        """This configuration, which a file holds, with the options that ``other`` chooses for loading.

        Raises:
            ConfigError: ``other`` asks for something else than what the model was quantized with.
        """
        for name, value in other.given.items():
            if name in self._fields and self._fields[name] != value:
                msg = (
                    f"the model was quantized with {name}={self._fields[name]!r}, which cannot become {value!r} while "
                    "it is loaded; leave it out, or quantize the float model with it (tfmq_fx.quantize)"
                )
                raise ConfigError(msg)
        return type(self)(other.lower, other.precision, **self._fields)

    def to_dict(self) -> dict[str, Any]:
        """What a file holds: JSON values, without what is chosen where a model is loaded."""
        return {"quant_method": self.quant_method.value, **self._fields}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same, without fields at their defaults."""
        from tfmq_fx.config.quantization import QuantizationConfig

        defaults = QuantizationConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults.get(name)}

    def __eq__(self, other: object) -> bool:
        """Whether both say the same."""
        return isinstance(other, TFMQConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # as diffusers' own, it can be changed


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """These fields as JSON values, checked as :class:`tfmq_fx.QuantizationConfig` does."""
    if not fields:
        return {}  # torch and torchao, which checking imports, can wait
    from tfmq_fx.config.quantization import QuantizationConfig
    from tfmq_fx.observers.registry import RecordedObserver

    name = fields.get("activation_range")
    # By its name alone: a model that is loaded has its ranges, so the observer need not be registered here.
    recorded = {"activation_range": RecordedObserver(name)} if isinstance(name, str) else {}
    values = QuantizationConfig.from_dict({**fields, **recorded}).to_dict()
    return {name: values[name] for name in fields}


announce()  # again, for whoever imported this before diffusers
