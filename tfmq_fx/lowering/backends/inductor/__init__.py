"""Just in time: Inductor with frozen weights, on our integer kernels or oneDNN's."""

from tfmq_fx.lowering.backends.inductor.backend import InductorBackend

__all__ = ["BACKEND", "InductorBackend"]

BACKEND = InductorBackend()
