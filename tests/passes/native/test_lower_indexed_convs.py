import pytest
import torch

from tests.passes.helpers import calls, operators, unchanged
from tests.passes.temporal.test_use_one_timestep_group import CONVS, batch, quantized
from tests.processor import needs_exact_sums
from tfmq_fx.passes import LowerIndexedConvs, UseOneTimestepGroup
from tfmq_fx.testing import assert_pass_contract

aten = torch.ops.aten


def one_group(**options):
    graph_module = quantized(**options)
    UseOneTimestepGroup()(graph_module)
    return graph_module


@needs_exact_sums
@pytest.mark.parametrize("kind", CONVS)
def test_convs_fire_and_keep_numerics(kind):
    result = assert_pass_contract(
        LowerIndexedConvs, one_group(kind=kind), batch(2, 500, 9.0), rtol=1e-4, atol=1e-4,
        more_inputs=[batch(2, 3, 9.0), batch(5, 999)],
    )  # fmt: skip
    assert result.modified
    (kernel,) = calls(result.graph_module, torch.ops.onednn.qconv_pointwise.tensor)
    assert kernel.meta["nn_module_stack"] and aten.conv2d.default not in operators(result.graph_module)


@needs_exact_sums
def test_convs_several_users():
    result = assert_pass_contract(LowerIndexedConvs, one_group(readers=3), batch(2, 500), rtol=1e-4, atol=1e-4)
    kernels = calls(result.graph_module, torch.ops.onednn.qconv_pointwise.tensor)
    assert len(kernels) == 3 and len({kernel.args[0] for kernel in kernels}) == 1


def test_convs_do_not_fire_on_other_forms():
    # Parameters per item, which the kernel does not take.
    assert unchanged(LowerIndexedConvs(), quantized())
    # A weight with a zero point, which the kernel ignores.
    graph_module = one_group()
    weight = calls(graph_module, aten.conv2d.default)[0].args[1]
    getattr(graph_module, weight.args[2].target).fill_(1)
    assert unchanged(LowerIndexedConvs(), graph_module)
    # Activations that need more than 8 bits.
    assert unchanged(LowerIndexedConvs(), one_group(bits=16))
    # Done already.
    graph_module = one_group()
    LowerIndexedConvs()(graph_module)
    assert unchanged(LowerIndexedConvs(), graph_module)
