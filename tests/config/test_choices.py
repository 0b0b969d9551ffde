"""The passes stand below the configuration and check for themselves: they take exactly its choices."""

from typing import get_args

import pytest
import torch

from tfmq_fx.config.choices import Lookup, TableStorage
from tfmq_fx.config.quantization import QuantizationConfig
from tfmq_fx.config.reconstruction import RECONSTRUCTIONS
from tfmq_fx.passes import CompressTemporalTable, IndexTimesteps, SetUnknownTimesteps

MAKERS = {
    "index": (lambda choice: IndexTimesteps(torch.arange(3), unknown=choice), get_args(Lookup)),
    "set": (SetUnknownTimesteps, get_args(Lookup)),
    # Float32 is how a table lies in the graph: there is nothing to compress.
    "compress": (CompressTemporalTable, tuple(set(get_args(TableStorage)) - {"float32"})),
}


@pytest.mark.parametrize(("make", "choices"), MAKERS.values(), ids=MAKERS)
def test_a_pass_takes_the_configurations_choices_and_no_others(make, choices):
    assert choices
    for choice in choices:
        make(choice)
    with pytest.raises((ValueError, RuntimeError)):
        make("no such choice")


def test_every_named_reconstruction_is_a_configuration():
    for name in RECONSTRUCTIONS:
        assert QuantizationConfig(reconstruction=name).reconstruction == RECONSTRUCTIONS[name]
