"""The way in: what a captured program is called with."""

from tfmq_fx.frontend.interface import BatchSize, ConstantInput, Interface, Parameter, TensorInput, interface_of
from tfmq_fx.frontend.plain_config import plain_config

__all__ = ["BatchSize", "ConstantInput", "Interface", "Parameter", "TensorInput", "interface_of", "plain_config"]
