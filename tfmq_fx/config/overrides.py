"""Values of the configuration for some layers, named by a role or a pattern of names."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from tfmq_fx.config.checks import check_choice, shown
from tfmq_fx.errors import ConfigError

__all__ = ["OVERRIDABLE", "ROLES", "checked_overrides", "names_layer"]

#: What ``keep_float`` and ``overrides`` name beside patterns: layers by what they touch.
ROLES = ("input", "output", "attention", "shortcut")
#: The fields that an override may have.
OVERRIDABLE = ("weight_bits", "activation_bits", "weight_range", "symmetric_weights", "low_rank", "shortcut_bits")


def names_layer(entry: str, fqn: str, roles: frozenset[str]) -> bool:
    """Whether an entry, a role or a pattern, names a layer of this name and these roles."""
    return entry in roles if entry in ROLES else fnmatch.fnmatchcase(fqn, entry)


def checked_overrides(config: Any) -> dict[str, dict[str, Any]]:
    """The overrides of a :class:`~tfmq_fx.QuantizationConfig`, each checked together with the fields that it leaves.

    Raises:
        ConfigError: They are no fields by role or pattern, or a layer would have values that the configuration refuses.
    """
    overrides = config.overrides
    if not isinstance(overrides, Mapping):
        example = "{'mid.*': {'weight_bits': 8}}"
        msg = f"overrides={shown(overrides)} must be fields by role or pattern, such as {example}"
        raise ConfigError(msg)
    checked = {}
    for pattern, values in overrides.items():
        if not isinstance(pattern, str) or not isinstance(values, Mapping):
            entry = f"{shown(pattern)}: {shown(values)}"
            msg = f"overrides has {entry} instead of 'mid.*': {{'weight_bits': 8}} or the like"
            raise ConfigError(msg)
        names = [check_choice(f"override of {pattern!r}: field", name, OVERRIDABLE) for name in values]
        layer = dataclasses.replace(config, overrides={}, **values)
        checked[str(pattern)] = {name: getattr(layer, name) for name in names}
    return checked
