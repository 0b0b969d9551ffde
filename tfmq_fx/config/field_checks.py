"""What each field of a quantization configuration is checked with, but for those that depend on others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from tfmq_fx.config.bits import check_bits
from tfmq_fx.config.checks import check_choice, check_names, check_switch, check_whole, plain
from tfmq_fx.config.choices import TableStorage, Temporal, UnknownTimestep, WeightRange
from tfmq_fx.errors import ConfigError
from tfmq_fx.observers.registry import RecordedObserver

__all__ = ["FIELD_CHECKS"]


def _check_groups(name: str, groups: Any) -> Any:
    try:
        return None if groups is None else check_whole(name, groups, least=1)
    except ConfigError as error:
        msg = f"{error}, or None for a range per timestep"
        raise ConfigError(msg) from None


def _check_rank(name: str, rank: Any) -> Any:
    return None if rank is None else check_whole(name, rank, least=1)


def _check_observer_name(_: str, name: Any) -> Any:
    """Its registration is checked together with ``activation_groups``; a name that was recorded stays one."""
    return name if isinstance(name, RecordedObserver) else plain(name)


#: By field; what a check returns is kept.
FIELD_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "weight_bits": check_bits,
    "activation_bits": check_bits,
    "temporal": partial(check_choice, choices=get_args(Temporal)),
    "table": partial(check_choice, choices=(None, *get_args(TableStorage))),
    "weight_range": partial(check_choice, choices=(None, *get_args(WeightRange))),
    "activation_range": _check_observer_name,
    "activation_groups": _check_groups,
    "symmetric_weights": partial(check_choice, choices=(None, False, True)),
    "symmetric_activations": check_switch,
    "symmetric_attention": check_switch,
    "defer_softmax": check_switch,
    "shortcut_bits": partial(check_choice, choices=(None, 8, 16)),
    "softmax_bits": partial(check_choice, choices=(None, 8, 16)),
    "output_bits": partial(check_bits, optional=True),
    "keep_float": check_names,
    "scale_channels": check_switch,
    "low_rank": _check_rank,
    "split_concatenations": check_switch,
    "unknown_timestep": partial(check_choice, choices=get_args(UnknownTimestep)),
}
