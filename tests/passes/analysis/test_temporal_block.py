"""The temporal block of real diffusers models, and of graphs made to mislead."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, small_denoiser
from tfmq_fx.frontend.capture import capture
from tfmq_fx.passes import IndexTimesteps, RemoveGuards, TabulateTemporalBlock
from tfmq_fx.passes.analysis import data_dependence, evaluate_temporal_nodes, find_temporal_block
from tfmq_fx.testing import GraphBuilder, TimePath, build_temporal_graph

aten = torch.ops.aten

TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
ATTENTION = {
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
#: Two levels of one layer: one block down each, two in the middle, two up each.
BLOCKS = 8


def tiny_unet(**options):
    torch.manual_seed(0)
    return UNet2DModel(**{**TINY, **options}).eval()


@functools.cache
def captured(*options, timestep="vector", dynamic=True):
    """A tiny UNet and its graph; whoever changes the graph copies it."""
    model = tiny_unet(**dict(options))
    return model, capture(model, example(timestep), dynamic_batch=dynamic)


def example(timestep="vector", batch=2):
    t = torch.tensor(7) if timestep == "scalar" else torch.tensor([7, 999])[:batch]
    return torch.randn(batch, 3, 8, 8), t


def sizes(block):
    return len(block.time_embedding), len(block.embedding_layers)


@pytest.mark.parametrize(
    "options, timestep, dynamic",
    [
        ({}, "scalar", True),
        ({}, "vector", False),
        (ATTENTION, "vector", True),
        ({"resnet_time_scale_shift": "scale_shift"}, "scalar", False),
        ({"resnet_time_scale_shift": "scale_shift"}, "vector", True),
    ],
)
def test_unet(options, timestep, dynamic):
    model, program = captured(*options.items(), timestep=timestep, dynamic=dynamic)
    block = find_temporal_block(program)
    layers = {name for name, _ in model.named_modules() if name.endswith("time_emb_proj")}
    assert {layer.fqn for layer in block.embedding_layers} == layers
    assert sizes(block) == (2, BLOCKS)
    assert [node.args[1].target for node in block.time_embedding] == [
        "time_embedding.linear_1.weight",
        "time_embedding.linear_2.weight",
    ]
    shifted = options.get("resnet_time_scale_shift") == "scale_shift"
    assert len(block.features) == BLOCKS * (2 if shifted else 1)
    assert all(layer.feeds == layer.fqn.removesuffix(".time_emb_proj") for layer in block.embedding_layers)


def test_class_conditional_unet():
    model = tiny_unet(num_class_embeds=4)
    program = capture(model, example(), example_kwargs={"class_labels": torch.tensor([1, 3])})
    alone = find_temporal_block(program)
    assert sizes(alone) == (2, 0) and len(alone.features) == 1
    together = find_temporal_block(program, finite=("class_labels",))
    assert sizes(together) == (2, BLOCKS)
    assert any(node.target is aten.embedding.default for node in together.nodes)
    assert not any(node.target is aten.embedding.default for node in alone.nodes)


def test_class_embedding_with_layers_of_its_own_belongs_to_the_finite_block():
    # class_embed_type="timestep": the labels go through a sinusoid and two linears before they are added.
    model = tiny_unet(class_embed_type="timestep")
    program = capture(model, example(), example_kwargs={"class_labels": torch.tensor([1, 3])})
    assert sizes(find_temporal_block(program)) == (2, 0)
    together = find_temporal_block(program, finite=("class_labels",))
    assert sizes(together) == (4, BLOCKS)
    read = {source for node in together.nodes for source in node.all_input_nodes if source not in together}
    tensors = {node.name for node in read if isinstance(node.meta["val"], torch.Tensor)}
    assert tensors == {"timestep", "class_labels"}


def tiny_condition_unet(**options):
    torch.manual_seed(0)
    shape = {**TINY, "in_channels": 4, "out_channels": 4, "attention_head_dim": 4, "cross_attention_dim": 8}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**shape, **blocks, **options}).eval()


def condition_example():
    return torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, 8)


def test_stable_diffusion_like_unet():
    block = find_temporal_block(capture(tiny_condition_unet(), condition_example()))
    assert sizes(block) == (2, BLOCKS) and len(block.features) == BLOCKS


def test_one_activation_for_all_blocks():
    block = find_temporal_block(capture(tiny_condition_unet(time_embedding_act_fn="silu"), condition_example()))
    assert sizes(block) == (2, BLOCKS)


def test_sdxl_like_unet_has_only_h():
    model = tiny_condition_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 8
    )
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 6)}
    program = capture(model, condition_example(), example_kwargs={"added_cond_kwargs": added})
    block = find_temporal_block(program)
    assert sizes(block) == (2, 0) and len(block.features) == 1
    assert block.features[0] is block.time_embedding[-1]


class Renamed(nn.Module):
    """The same model with names that say nothing."""

    def __init__(self, model):
        super().__init__()
        self.zebra = model

    def forward(self, noise, moment):
        return self.zebra(noise, moment)[0]


def test_names_do_not_matter():
    model = tiny_unet()
    for parent in list(model.modules()):
        for name in list(parent._modules):
            if name in ("linear_1", "linear_2", "time_emb_proj"):
                parent._modules[name] = nn.Sequential(parent._modules[name])
    block = find_temporal_block(capture(Renamed(model), example()), "moment")
    assert sizes(block) == (2, BLOCKS)
    assert all(layer.fqn.startswith("zebra.") for layer in block.embedding_layers)


def test_an_exported_program_is_read_without_capture():
    model = tiny_unet()
    program = torch.export.export(model, example())
    block = find_temporal_block(program)
    assert sizes(block) == (2, BLOCKS)


def test_the_block_prints_as_a_tree():
    text = str(find_temporal_block(capture(small_denoiser(), (torch.randn(2, 1, 8, 8), torch.tensor([1, 2])))))
    assert text.splitlines() == [
        "temporal block of (timestep): 33 nodes, 4 linears",
        "├─ h: 2 linears in the time embed",
        "│  ├─ time.one [16 × 16]",
        "│  ├─ time.two [16 × 16]",
        "├─ g: 2 embedding layers",
        "│  ├─ down.embed [8 × 16] → down",
        "│  ├─ up.embed [8 × 16] → up",
        "└─ 2 features read outside the block",
    ]


# -- the two structures that the README names -----------------------------------------------------------------


def on_meta(model_class, config, inputs):
    """Export without weights: on the meta device only shapes are computed, so full size costs seconds."""
    with torch.device("meta"):
        return torch.export.export(model_class(**config).eval(), inputs())


def test_google_ddpm_cifar10_32_has_22_embedding_layers_and_2_linears_in_h():
    config = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    program = on_meta(UNet2DModel, config, lambda: (torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)))
    block = find_temporal_block(program)
    assert sizes(block) == (2, 22)
    assert sum(int(layer.linear.meta["val"].shape[-1]) for layer in block.embedding_layers) == 4992


def test_stable_diffusion_1_5_has_22_embedding_layers_and_2_linears_in_h():
    config = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }

    def inputs():
        return torch.randn(2, 4, 64, 64), torch.zeros((), dtype=torch.int64), torch.randn(2, 77, 768)

    block = find_temporal_block(on_meta(UNet2DConditionModel, config, inputs))
    assert sizes(block) == (2, 22)
    assert sum(int(layer.linear.meta["val"].shape[-1]) for layer in block.embedding_layers) == 20160


# -- no block: empty, with a sentence ------------------------------------------------------------------------


def two_inputs():
    builder = GraphBuilder()
    return builder, builder.placeholder("sample", (2, 4)), builder.placeholder("timestep", (2,), torch.int64)


def assert_empty(graph_module, sentence, **options):
    block = find_temporal_block(graph_module, **options)
    assert not block and not block.nodes and not block.linears and not block.features
    assert str(block) == f"no temporal block: {block.reason}"
    assert sentence in block.reason


def test_no_input_of_that_name():
    builder, x, _ = two_inputs()
    graph_module = builder.build(x)
    assert_empty(graph_module, "no input named 't'; its inputs are sample, timestep", timestep="t")
    assert_empty(graph_module, "no input named 'class_labels'", finite=("class_labels",))


def test_a_timestep_that_nobody_reads():
    builder, x, t = two_inputs()
    builder.call(aten._assert_tensor_metadata.default, t, None, None, torch.int64)
    assert_empty(builder.build(builder.call(aten.silu.default, x)), "nothing in the model reads the values")


def test_a_timestep_read_for_its_shape_alone():
    builder, x, t = two_inputs()
    ones = builder.call(aten.new_ones.default, t, [2, 4])
    assert_empty(builder.build(builder.call(aten.add.Tensor, x, ones)), "nothing in the model reads the values")


def test_a_wholly_conditional_model():
    builder, x, t = two_inputs()
    column = builder.call(aten.unsqueeze.default, t, 1)
    mixed = builder.call(aten.linear.default, builder.call(aten.mul.Tensor, x, column), builder.weight("w", (4, 4)))
    assert_empty(builder.build(mixed), "no linear layer depends on 'timestep' alone; it is wholly conditional")


def test_a_timestep_that_meets_the_sample_at_once():
    builder = GraphBuilder()
    x, t = builder.placeholder("sample", (2,)), builder.placeholder("timestep", (2,), torch.int64)
    assert_empty(builder.build(builder.call(aten.mul.Tensor, x, t)), "meets the other inputs before any operation")


@pytest.mark.parametrize(
    "target, args, sentence",
    [
        (aten.dropout.default, (0.5, True), "draws random numbers"),
        (aten.rand_like.default, (), "draws random numbers"),
        (aten.add_.Tensor, (1.0,), "writes in place"),
    ],
)
def test_random_and_mutating_blocks_are_refused(target, args, sentence):
    builder, x, t = two_inputs()
    column = builder.call(aten.to.dtype, builder.call(aten.unsqueeze.default, t, 1), torch.float32)
    noisy = builder.call(target, column, *args)
    linear = builder.call(aten.linear.default, noisy, builder.weight("w", (4, 1)))
    graph_module = builder.build(builder.call(aten.add.Tensor, x, linear))
    assert_empty(graph_module, sentence)
    assert noisy.name in find_temporal_block(graph_module).reason


@pytest.mark.parametrize("args, kwargs", [((0.0, True), {}), ((0.5, False), {}), ((), {"p": 0.5, "train": False})])
def test_an_idle_dropout_is_no_reason_to_refuse(args, kwargs):
    builder, x, t = two_inputs()
    column = builder.call(aten.to.dtype, builder.call(aten.unsqueeze.default, t, 1), torch.float32)
    idle = builder.call(aten.dropout.default, column, *args, **kwargs)
    linear = builder.call(aten.linear.default, idle, builder.weight("w", (4, 1)))
    block = find_temporal_block(builder.build(builder.call(aten.add.Tensor, x, linear)))
    assert sizes(block) == (1, 0)


def test_not_a_diffusion_model():
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), (torch.randn(2, 4),))
    assert_empty(program, "no input named 'timestep'; its inputs are input")


# -- data dependence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, args",
    [
        (aten.expand_as.default, ()),
        (aten.type_as.default, ()),
        (aten.to.other, ()),
        (aten.view_as.default, ()),
        (aten.reshape_as.default, ()),
    ],
)
def test_the_other_tensor_gives_its_shape_or_dtype_but_no_data(target, args):
    builder = GraphBuilder()
    x, y = builder.placeholder("x", (2, 4)), builder.placeholder("y", (2, 4))
    node = builder.call(target, x, y, *args)
    assert data_dependence(builder.build(node))[node] == {"x"}


@pytest.mark.parametrize(
    "target, args, wanted",
    [
        (aten.ones_like.default, (), set()),
        (aten.new_full.default, ([2], 3.0), set()),
        (aten.sym_size.int, (0,), set()),
        (aten.add.Tensor, (1,), {"x"}),
        (aten.masked_fill.Scalar, (None, 0.0), {"x", "y"}),
    ],
)
def test_what_a_node_depends_on(target, args, wanted):
    builder = GraphBuilder(dynamic_batch=True)
    x, y = builder.placeholder("x", (builder.batch, 4)), builder.placeholder("y", (builder.batch, 4), torch.bool)
    node = builder.call(target, x, *(y if argument is None else argument for argument in args))
    assert data_dependence(builder.build(node))[node] == wanted


def test_the_analysis_changes_nothing():
    graph_module = build_temporal_graph(TimePath(class_embedding="linear", asserts=True)).graph_module
    before = str(graph_module.graph), [dict(node.meta) for node in graph_module.graph.nodes]
    find_temporal_block(graph_module, finite=("class_labels",))
    assert (str(graph_module.graph), [dict(node.meta) for node in graph_module.graph.nodes]) == before


# -- the block alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep, dynamic", [("scalar", True), ("vector", True), ("vector", False)])
def test_the_block_evaluated_alone_gives_what_the_model_computes(timestep, dynamic):
    model, program = captured(timestep=timestep, dynamic=dynamic)
    block = find_temporal_block(program)
    values = torch.tensor([0, 7, 500, 999, 3])
    outputs = [layer.linear for layer in block.embedding_layers]
    tables = evaluate_temporal_nodes(program, block.nodes, outputs, {"timestep": values})
    embedding = model.time_embedding(model.time_proj(values))
    for layer, table in zip(block.embedding_layers, tables, strict=True):
        want = model.get_submodule(layer.fqn)(nn.functional.silu(embedding))
        assert torch.allclose(table, want, atol=1e-5)


def test_a_captured_unet_is_tabulated_without_its_temporal_layers():
    model, program = captured(timestep="scalar")
    program = copy.deepcopy(program)
    IndexTimesteps([7, 500])(program)
    TabulateTemporalBlock()(program)
    RemoveGuards()(program)
    assert not find_temporal_block(program)
    weights = [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]
    assert not any("time_emb" in name for name in weights)
    sample, _ = example(batch=2)
    for value in (7, 500):
        got = program(sample, torch.tensor(value))
        assert torch.allclose(got[0] if isinstance(got, tuple) else got.sample, model(sample, value).sample, atol=1e-5)


class SharedFrequencies(nn.Module):
    """A timestep and a guidance scale are embedded with the same frequencies, as in Flux."""

    def __init__(self):
        super().__init__()
        self.time, self.guide, self.enter = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, sample, timestep, guidance):
        frequencies = torch.exp(-torch.arange(8) / 2)
        time = self.time(torch.sin(timestep[:, None] * frequencies))
        both = time + self.guide(torch.sin(guidance[:, None] * frequencies))
        return self.enter(sample) + both[:, :, None, None]


@torch.no_grad()
def test_constants_that_are_read_outside_the_block_too_are_computed():
    torch.manual_seed(0)
    model = SharedFrequencies().eval()
    given = [(torch.randn(4, 1, 8, 8), TIMESTEPS[n : n + 4], torch.rand(4) * 5) for n in range(6)]
    graph_module = tfmq_fx.capture(model, given[0])
    (linear,) = find_temporal_block(graph_module).linears
    wanted = model.time(torch.sin(TIMESTEPS[:, None] * torch.exp(-torch.arange(8) / 2)))
    block = find_temporal_block(graph_module)
    (table,) = evaluate_temporal_nodes(graph_module, block.nodes, [linear], {"timestep": TIMESTEPS})
    torch.testing.assert_close(table, wanted)
    program = tfmq_fx.quantize(model, None, given, timesteps=TIMESTEPS, progress=False)
    denoiser = tfmq_fx.lower(program, backend="reference")
    torch.testing.assert_close(denoiser(*given[3]), program(*given[3]), rtol=1e-4, atol=1e-5)
