"""The engines that ``latency.py`` holds against each other, and how to add one.

An engine is a row of :data:`ENGINES`: an environment, a module of this package, and settings for it. The module has

- ``load(folder, settings, inputs)``: build the engine for the batch of ``inputs`` (arrays by name) from the files in
  the UNet's ``folder``, and return ``step(inputs)``, which gives the prediction as a float32 array;
- ``prepare(folder, settings)``, where it needs files of its own: quantize, export; called once;
- ``files(folder, settings)``: the files that a user would keep, weights included.

A module imports its library inside these functions, and nothing of torch where its environment has none. ``load``
raises :class:`Unavailable` with a sentence for what cannot be measured here.
"""

from latency_engines.engine import Engine, Unavailable
from latency_engines.table import ENGINES, GROUPS

__all__ = ["ENGINES", "GROUPS", "Engine", "Unavailable"]
