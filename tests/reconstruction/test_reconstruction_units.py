import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

import tfmq_fx
from tests.models import TIMESTEPS, Block, TimePath, batch, small_denoiser
from tfmq_fx.passes import SplitConcatenatedConvs
from tfmq_fx.passes.analysis import find_temporal_block, find_units, layer_name
from tfmq_fx.passes.support.predicates import is_weighted
from tfmq_fx.testing import GraphBuilder
from tfmq_fx.testing.canonical import canonical_text

aten = torch.ops.aten
TINY = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@pytest.fixture(scope="module")
def small():
    return tfmq_fx.capture(small_denoiser(), batch())


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    model = UNet2DModel(in_channels=1, out_channels=1, add_attention=False, **TINY, **blocks).eval()
    return tfmq_fx.capture(model, (torch.randn(2, 1, 8, 8), torch.tensor([1, 2])))


def units(graph_module, **options):
    return [(unit.kind, unit.name) for unit in find_units(graph_module, **options)]


def layers(graph_module, **options):
    return {unit.name: [layer_name(node) for node in unit.weighted] for unit in find_units(graph_module, **options)}


def without_modules(graph_module):
    bare = copy.deepcopy(graph_module)
    for node in bare.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return bare


SMALL = [
    ("temporal", "temporal block"),
    ("layer", "enter"),
    ("residual", "down"),
    ("residual", "qkv"),
    ("residual", "up"),
    ("layer", "leave"),
]
UNET = [
    ("temporal", "temporal block"),
    ("layer", "conv_in"),
    ("residual", "down_blocks.0.resnets.0"),
    ("layer", "down_blocks.0.downsamplers.0.conv"),
    ("residual", "down_blocks.1.resnets.0"),
    ("residual", "down_blocks.1.attentions.0"),
    ("residual", "mid_block.resnets.0"),
    ("residual", "mid_block.resnets.1"),
    ("residual", "up_blocks.0.resnets.0"),
    ("residual", "up_blocks.0.resnets.1"),
    ("layer", "up_blocks.0.upsamplers.0.conv"),
    ("residual", "up_blocks.1.resnets.0"),
    ("residual", "up_blocks.1.resnets.1"),
    ("layer", "conv_out"),
]


def test_blocks_of_a_small_denoiser(small):
    before = canonical_text(small)
    assert units(small) == SMALL
    assert layers(small) == {
        "temporal block": ["time.one", "time.two", "down.embed", "up.embed"],
        "enter": ["enter"],
        "down": ["down.conv1", "down.conv2"],
        "qkv": ["qkv"],
        "up": ["up.conv1", "up.shortcut", "up.conv2"],
        "leave": ["leave"],
    }
    assert canonical_text(small) == before


def test_blocks_of_a_diffusers_unet(unet):
    assert units(unet) == UNET
    found = layers(unet)
    attention = "down_blocks.1.attentions.0"
    assert found[attention] == [f"{attention}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    resnet = "up_blocks.1.resnets.0"
    assert found[resnet] == [f"{resnet}.{name}" for name in ("conv1", "conv2", "conv_shortcut")]


def test_blocks_of_a_conditional_unet():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    }
    model = UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=12, **TINY, **blocks).eval()
    graph_module = tfmq_fx.capture(model, (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 12)))
    attention = "down_blocks.1.attentions.0"
    transformer = f"{attention}.transformer_blocks.0"
    assert units(graph_module)[4:9] == [
        ("residual", "down_blocks.1.resnets.0"),
        ("layer", f"{attention}.proj_in"),
        ("residual", transformer),
        ("layer", f"{attention}.proj_out"),
        ("residual", "up_blocks.0.resnets.0"),
    ]
    names = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert layers(graph_module)[transformer] == [f"{transformer}.{n}" for n in (*names, "ff.net.0.proj", "ff.net.2")]
    bare = [(kind, name.removeprefix(f"{attention}.")) for kind, name in units(without_modules(graph_module))]
    assert [unit for unit in bare if unit[1].startswith(("proj", "transformer"))] == [
        ("layer", "proj_in"),
        ("residual", "transformer_blocks.0.attn1"),
        # The keys and values of the prompt enter the block from the side.
        ("layer", "transformer_blocks.0.attn2.to_k"),
        ("layer", "transformer_blocks.0.attn2.to_v"),
        ("residual", "transformer_blocks.0.attn2"),
        ("residual", "transformer_blocks.0.ff.net"),
        ("layer", "proj_out"),
    ]


@pytest.mark.parametrize("temporal", [True, False])
def test_structure_alone_finds_the_same_blocks(small, unet, temporal):
    for graph_module in (small, unet):
        assert units(without_modules(graph_module), temporal=temporal) == units(graph_module, temporal=temporal)
        assert layers(without_modules(graph_module), temporal=temporal) == layers(graph_module, temporal=temporal)


def test_a_prepared_graph_has_the_same_units(small, unet):
    for graph_module in (small, unet):
        prepared = tfmq_fx.prepare(graph_module, timesteps=TIMESTEPS)
        assert units(prepared) == units(graph_module)
        assert {k: set(v) for k, v in layers(prepared).items()} == {k: set(v) for k, v in layers(graph_module).items()}


def test_observers_belong_to_the_unit_that_alone_reads_them(small):
    prepared = tfmq_fx.prepare(small, timesteps=TIMESTEPS)
    found = {unit.name: unit for unit in find_units(prepared)}
    for node in prepared.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        readers = {name for name, unit in found.items() for user in node.users if user in unit.nodes}
        outside = [user for user in node.users if not any(user in unit.nodes for unit in found.values())]
        inside = {name for name, unit in found.items() if node in unit.nodes}
        # The observer of the skip reads what "enter" computes, and the split shortcut of "up" reads the observer.
        assert inside == (readers if len(readers) == 1 and not outside else set()), node
    assert sum(node.op == "call_module" for node in found["up"].nodes) == 8


def test_without_a_temporal_unit_embedding_layers_belong_to_their_blocks(small, unet):
    time = [("layer", "time.one"), ("layer", "time.two")]
    assert units(small, temporal=False) == [*time, *SMALL[1:]]
    assert layers(small, temporal=False)["down"] == ["down.conv1", "down.embed", "down.conv2"]
    resnet = "mid_block.resnets.0"
    assert layers(unet, temporal=False)[resnet] == [f"{resnet}.{n}" for n in ("conv1", "time_emb_proj", "conv2")]
    block = find_temporal_block(small)
    down = next(unit for unit in find_units(small, temporal=False) if unit.name == "down")
    inside = [str(node.target) for node in down.nodes if node in block and node.op == "call_function"]
    assert inside == ["aten.silu.default", "aten.linear.default", "aten.slice.Tensor", *["aten.unsqueeze.default"] * 2]


def test_layers_one_by_one(small):
    names = ["down.conv1", "down.conv2", "qkv", "up.conv1", "up.shortcut", "up.conv2", "leave"]
    found = units(small, granularity="layer")
    assert found == [("temporal", "temporal block"), ("layer", "enter"), *(("layer", name) for name in names)]
    found = find_units(small, granularity="layer", temporal=False)
    assert all(unit.kind == "layer" and len(unit.weighted) == 1 for unit in found)
    assert sorted(unit.name for unit in found) == sorted(
        [*names, "enter", "time.one", "time.two", "down.embed", "up.embed"]
    )
    conv = next(unit for unit in found if unit.name == "down.conv1")
    assert [node.op for node in conv.nodes] == ["get_attr", "get_attr", "call_function"]


class Lying(nn.Module):
    """What is called after the time has nothing to do with it, and the other way round."""

    def __init__(self):
        super().__init__()
        self.conv_in = TimePath()
        self.time_embedding = nn.Conv2d(1, 8, 3, padding=1)
        self.temporal_block = Block(8, 8)
        self.layer = nn.Conv2d(8, 1, 1)

    def forward(self, sample, timestep):
        return self.layer(self.temporal_block(self.time_embedding(sample), self.conv_in(timestep)))


def test_names_that_lie():
    torch.manual_seed(0)
    graph_module = tfmq_fx.capture(Lying(), batch())
    assert units(graph_module) == [
        ("temporal", "temporal block"),
        ("layer", "time_embedding"),
        ("residual", "temporal_block"),
        ("layer", "layer"),
    ]
    assert layers(graph_module)["temporal block"] == ["conv_in.one", "conv_in.two", "temporal_block.embed"]


def test_a_model_without_timestep_has_no_temporal_unit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.SiLU(), nn.Conv2d(4, 1, 1))
    graph_module = tfmq_fx.capture(model, (torch.randn(2, 1, 4, 4),))
    assert units(graph_module) == [("layer", "0"), ("layer", "2")]


def test_a_sum_of_split_convolutions_is_no_residual_join():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, sample):
            return self.two(torch.cat([self.one(sample), sample], 1))

    graph_module = tfmq_fx.capture(nn.Sequential(Up()), (torch.randn(2, 2, 4, 4),))
    assert SplitConcatenatedConvs()(graph_module).modified
    expected = [("layer", "0.one"), ("layer", "0.two"), ("layer", "0.two (2)")]
    assert sorted(units(graph_module)) == expected
    assert [kind for kind, _ in units(without_modules(graph_module))] == ["layer"] * 3


def test_a_module_that_is_called_twice_is_two_units():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(8, 8)

        def forward(self, sample, emb):
            return self.block(self.block(sample, emb), emb)

    graph_module = tfmq_fx.capture(Twice(), (torch.randn(2, 8, 4, 4), torch.randn(2, 16)))
    assert units(graph_module) == [("residual", "block"), ("residual", "block (2)")]
    first, second = find_units(graph_module)
    assert len(first.weighted) == len(second.weighted) == 3
    # Their weights are read by both, so they stay outside of both.
    assert not any(node.op == "get_attr" for node in (*first.nodes, *second.nodes))


def residual(builder, x, name, *, read=None):
    hidden = builder.call(aten.silu.default, x)
    hidden = builder.call(aten.linear.default, hidden, builder.weight(f"{name}.weight", (4, 4)))
    if read is not None:
        read.append(hidden)
    return builder.call(aten.add.Tensor, x, builder.call(aten.relu.default, hidden))


def test_a_long_skip_does_not_swallow_the_blocks_that_it_spans():
    builder = GraphBuilder()
    x = builder.placeholder("sample", (2, 4))
    first = builder.call(aten.linear.default, x, builder.weight("first.weight", (4, 4)))
    hidden = residual(builder, residual(builder, first, "a"), "b")
    last = builder.call(aten.linear.default, hidden, builder.weight("last.weight", (4, 4)))
    graph_module = builder.build(builder.call(aten.add.Tensor, first, last))
    assert units(graph_module) == [("layer", "first"), ("residual", "a"), ("residual", "b"), ("layer", "last")]


def test_a_region_that_is_read_inside_is_none():
    builder = GraphBuilder()
    read = []
    x = builder.placeholder("sample", (2, 4))
    join = residual(builder, x, "a", read=read)
    graph_module = builder.build((residual(builder, join, "b"), read[0]))
    assert units(graph_module) == [("layer", "a"), ("residual", "b")]


def test_a_region_without_a_name():
    builder = GraphBuilder()
    x = builder.placeholder("sample", (2, 4))
    first = builder.call(aten.linear.default, x, builder.weight("enter.weight", (4, 4)))
    hidden = builder.call(aten.linear.default, first, builder.weight("one.weight", (4, 4)))
    hidden = builder.call(aten.linear.default, hidden, builder.weight("two.weight", (4, 4)))
    graph_module = builder.build(builder.call(aten.add.Tensor, first, hidden))
    assert units(graph_module) == [("layer", "enter"), ("residual", "region 1")]


def test_a_module_around_another_unit_falls_back_to_layers():
    builder = GraphBuilder()
    x = builder.placeholder("sample", (2, 4))
    with builder.inside("outer"):
        first = builder.call(aten.linear.default, x, builder.weight("outer.first.weight", (4, 4)))
        with builder.inside("outer.inner"):
            middle = residual(builder, first, "outer.inner.fc")
        last = builder.call(aten.linear.default, middle, builder.weight("outer.last.weight", (4, 4)))
        join = builder.call(aten.add.Tensor, x, last)
    found = units(builder.build(join))
    assert found == [("layer", "outer.first"), ("residual", "outer.inner"), ("layer", "outer.last")]


def test_blocks_that_feed_each_other_are_not_both_units():
    builder = GraphBuilder()
    x, y = builder.placeholder("sample", (2, 4)), builder.placeholder("other", (2, 4))

    def linear(source, name):
        return builder.call(aten.linear.default, source, builder.weight(f"{name}.weight", (4, 4)))

    with builder.inside("a"):
        first = linear(x, "a.one")
    with builder.inside("b"):
        second = builder.call(aten.add.Tensor, y, linear(builder.call(aten.mul.Tensor, y, first), "b.one"))
        third = builder.call(aten.add.Tensor, y, linear(y, "b.two"))
    with builder.inside("a"):
        fourth = builder.call(aten.add.Tensor, x, linear(builder.call(aten.mul.Tensor, x, third), "a.two"))
    graph_module = builder.build((second, fourth))
    assert units(graph_module) == [("layer", "b.two"), ("residual", "a"), ("layer", "b.one")]
    assert layers(graph_module)["a"] == ["a.one", "a.two"]


def test_a_temporal_layer_that_waits_for_a_feature_map_is_not_in_the_temporal_unit():
    builder = GraphBuilder()
    sample, t = builder.placeholder("sample", (2, 4)), builder.placeholder("timestep", (2, 1))

    def linear(source, name, width):
        return builder.call(aten.linear.default, source, builder.weight(f"{name}.weight", (4, width)))

    time = linear(t, "time", 1)
    hidden = builder.call(aten.mul.Tensor, linear(sample, "enter", 4), time)
    late = linear(builder.call(aten.expand_as.default, time, hidden), "late", 4)
    graph_module = builder.build(builder.call(aten.mul.Tensor, hidden, late))
    assert late in find_temporal_block(graph_module)
    assert units(graph_module) == [("temporal", "temporal block"), ("layer", "enter"), ("layer", "late")]
    assert layers(graph_module)["temporal block"] == ["time"]


def test_dead_layers_are_units_too():
    builder = GraphBuilder()
    x = builder.placeholder("sample", (2, 4))
    builder.call(aten.linear.default, x, builder.weight("dead.weight", (4, 4)))
    graph_module = builder.build(builder.call(aten.linear.default, x, builder.weight("live.weight", (4, 4))))
    assert units(graph_module) == [("layer", "dead"), ("layer", "live")]
    assert sum(is_weighted(node) for node in graph_module.graph.nodes) == 2


def test_an_embedding_layer_outside_its_block_follows_the_block():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.enter = TimePath(), nn.Conv2d(1, 8, 1)
            self.projections = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
            self.blocks = nn.ModuleList([Plain(), Plain()])

        def forward(self, sample, timestep):
            emb, hidden = self.time(timestep), self.enter(sample)
            for project, block in zip(self.projections, self.blocks, strict=True):
                hidden = block(hidden, project(nn.functional.silu(emb)))
            return hidden

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x, features):
            return x + self.two(nn.functional.silu(self.one(x) + features[:, :, None, None]))

    graph_module = tfmq_fx.capture(Model(), batch())
    found = layers(graph_module, temporal=False)
    assert {name for name in found} == {"time.one", "time.two", "enter", "blocks.0", "blocks.1"}
    assert sorted(found["blocks.1"]) == ["blocks.1.one", "blocks.1.two", "projections.1"]
