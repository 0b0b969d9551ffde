"""Capture: what goes in, what comes out, and what is refused."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch import fx, nn

from tests.models import batch, small_denoiser
from tfmq_fx.errors import CaptureError
from tfmq_fx.frontend.capture import capture
from tfmq_fx.passes.support.predicates import fqn

aten = torch.ops.aten


class Residual(nn.Module):
    """Something of everything that capture has to clean up: dropout, no-op casts, division by one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(4, 4)

    def forward(self, x, y=None, *, scale=None):
        h = self.dropout(self.first(x)).to(x.dtype) / 1.0
        h = self.second(nn.functional.silu(h)) + x
        if y is not None:
            h = h + y
        return h if scale is None else h * scale


def model():
    torch.manual_seed(0)
    return Residual()


def inputs(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]


def operators(graph_module):
    return {node.target for node in graph_module.graph.nodes if node.op == "call_function"}


# -- what goes in -------------------------------------------------------------------------------------------------


def test_a_module():
    module, x = model().eval(), torch.randn(3, 4)
    program = capture(module, (x,))
    assert torch.equal(program(x), module(x))


def test_a_symbolically_traced_graph():
    module, (x, t) = small_denoiser(), batch()
    traced = fx.symbolic_trace(module)
    program = capture(traced, (x, t))
    assert torch.equal(program(x, t), module(x, t)) and inputs(program) == ["sample", "timestep"]
    assert not any(node.op in ("call_module", "call_method") for node in program.graph.nodes)


def test_an_exported_program_needs_no_example():
    module, (x, t) = small_denoiser(), batch()
    exported = torch.export.export(module, (x, t))
    program = capture(exported)
    assert torch.equal(program(x, t), module(x, t))
    assert program.meta["tfmq_fx.interface"].model_class == "ExportedProgram"


def test_module_and_exported_program_give_the_same_graph():
    module, example = small_denoiser(), batch()
    ways = [module, torch.export.export(module, example)]
    graphs = [capture(way, example, dynamic_batch=False) for way in ways]
    calls = [[n.target for n in graph.graph.nodes if n.op == "call_function"] for graph in graphs]
    assert calls[0] == calls[1] and set(graphs[0].state_dict()) == set(graphs[1].state_dict())


# -- what comes out -------------------------------------------------------------------------------------------------


def test_guards_dropouts_casts_and_identities_are_gone():
    program = capture(model(), (torch.randn(3, 4),))
    assert operators(program) == {aten.linear.default, aten.silu.default, aten.add.Tensor}


def test_nodes_know_their_value_and_calls_their_module():
    program = capture(model(), (torch.randn(3, 4),))
    linears = [node for node in program.graph.nodes if node.target is aten.linear.default]
    assert [list(node.meta["nn_module_stack"].values())[-1][0] for node in linears] == ["first", "second"]
    assert all("val" in node.meta for node in program.graph.nodes if node.op != "output")


def test_the_state_keeps_its_names_and_nothing_else_is_left():
    assert set(capture(model(), (torch.randn(3, 4),)).state_dict()) == set(model().state_dict())


def test_arguments_keep_their_names_in_any_combination():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    scale = torch.tensor(2.0)
    module = model().eval()
    program = capture(module, (x, y))
    assert inputs(program) == ["x", "y"] and torch.equal(program(x, y), module(x, y))
    program = capture(module, (x,), example_kwargs={"y": y, "scale": scale})
    assert inputs(program) == ["x", "y", "scale"]
    assert torch.equal(program(x, y, scale=scale), module(x, y, scale=scale))
    program = capture(module, example_kwargs={"scale": scale, "x": x})
    assert inputs(program) == ["x", "scale"]
    assert torch.equal(program(x, scale=scale), module(x, scale=scale))


def test_variable_arguments():
    class Sum(nn.Module):
        def forward(self, first, *rest):
            return first + sum(rest)

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    program = capture(Sum(), (x, y, x))
    assert torch.equal(program(x, y, x), Sum()(x, y, x))
    assert torch.equal(program(x[:1], y[:1], x[:1]), Sum()(x[:1], y[:1], x[:1]))


def test_variable_keywords():
    class Named(nn.Module):
        def forward(self, first, **named):
            return first + named["bias"] * 2

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    program = capture(Named(), (x,), example_kwargs={"bias": y}, dynamic_batch=False)
    assert torch.equal(program(x, bias=y), Named()(x, bias=y))


def test_the_output_structure_is_that_of_the_model():
    class Several(nn.Module):
        def forward(self, x):
            return {"sum": x + 1, "parts": (x.sin(), [x.cos()])}

    x = torch.randn(3, 4)
    found = capture(Several(), (x,))(x)
    assert set(found) == {"sum", "parts"} and isinstance(found["parts"][1], list)
    assert torch.equal(found["parts"][1][0], x.cos())


@pytest.mark.parametrize("timestep", [7, 7.5])
def test_a_timestep_given_as_a_number_stays_an_input(timestep):
    module, (x, _) = small_denoiser(), batch()

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = module

        def forward(self, sample, timestep):
            return self.model(sample, torch.as_tensor(timestep).expand(sample.shape[0]))

    program = capture(Scalar(), (x, timestep))
    other = torch.tensor(timestep) * 3
    assert torch.equal(program(x, other), module(x, other.expand(4)))


def test_a_diffusers_model_is_called_as_before_and_its_configuration_travels_with_the_graph():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    program = capture(unet, (x, t))
    assert inputs(program) == ["sample", "timestep"]
    assert torch.equal(program(x, t).sample, unet(x, t).sample)
    interface = program.meta["tfmq_fx.interface"]
    assert interface.model_class == "UNet2DModel" and interface.config["block_out_channels"] == [8, 8]


class Scaled(nn.Module):
    def forward(self, x, mod):
        return x * mod


class NamesItsArgumentMod(nn.Module):
    """Tracing by running wraps module calls in a function whose own first argument is called ``mod``."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scaled = Scaled()

    def forward(self, x):
        return self.scaled(self.linear(x), mod=x.sin())


def test_what_cannot_be_traced_by_running_it_is_read_from_its_bytecode():
    module = NamesItsArgumentMod()
    program = capture(module, (torch.randn(2, 4),))
    x = torch.randn(5, 4)
    assert torch.equal(program(x), module(x))
    linear = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert fqn(linear) == "linear"


def test_the_route_of_a_capture_is_told():
    x, plain = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    routes = {
        "export": plain,
        "symbolic_trace, export": fx.symbolic_trace(plain),
        "exported program": torch.export.export(plain, (x,)),
    }
    for route, what in routes.items():
        assert capture(what, () if route == "exported program" else (x,)).meta["tfmq_fx.interface"].route == route


# -- batch sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_dynamic_batch_takes_every_size(example, size):
    module = small_denoiser()
    program = capture(module, batch(example))
    x, t = batch(size)
    assert torch.allclose(program(x, t), module(x, t), atol=1e-6)


def test_a_static_batch_is_that_of_the_example():
    module = small_denoiser()
    program = capture(module, batch(3), dynamic_batch=False)
    assert torch.equal(program(*batch(3)), module(*batch(3)))
    sample = next(node for node in program.graph.nodes if node.op == "placeholder")
    assert sample.meta["val"].shape == (3, 1, 8, 8)


def test_a_limit_of_the_model_on_the_batch_is_kept_and_told():
    class Limited(nn.Module):
        def forward(self, x):
            return (x if x.shape[0] < 64 else x.contiguous()).sin()

    program = capture(Limited(), (torch.randn(2, 3),))
    assert program.meta["tfmq_fx.interface"].max_batch == 63
    assert torch.equal(program(torch.ones(40, 3)), torch.ones(40, 3).sin())
    assert capture(model(), (torch.randn(2, 4),)).meta["tfmq_fx.interface"].max_batch is None


@pytest.mark.parametrize("frames", [2, 3, 7])
def test_a_limit_on_a_multiple_of_the_batch_is_kept_and_told(frames):
    class Video(nn.Module):
        """Folds frames into the batch, then does what diffusers' upsampler does beyond 64 images."""

        def forward(self, x):
            x = x.flatten(0, 1)
            return (x if x.shape[0] < 64 else x.contiguous()).sin()

    program = capture(Video(), (torch.randn(2, frames, 3),))
    most = program.meta["tfmq_fx.interface"].max_batch
    assert most * frames < 64 <= (most + 1) * frames
    assert torch.equal(program(torch.ones(most, frames, 3)), torch.ones(most * frames, 3).sin())


def test_a_batch_that_cannot_be_dynamic_says_so():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.sin() if x.shape[0] == 3 else x.cos()

    with pytest.raises(
        CaptureError, match=r"the batch of Fixed cannot be dynamic .*batched=, or pass dynamic_batch=False"
    ):
        capture(Fixed(), (torch.randn(3, 2),))
    assert capture(Fixed(), (torch.randn(3, 2),), dynamic_batch=False) is not None


# -- the model itself stays as it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_of_every_module_is_restored(training):
    module = model().train(training)
    module.dropout.train(not training)
    capture(module, (torch.randn(2, 4),))
    assert module.training is training and module.dropout.training is not training


def test_the_training_mode_is_restored_after_an_error():
    module = model().train()
    with pytest.raises(CaptureError):
        capture(module, (torch.randn(2, 5),))
    assert all(part.training for part in module.modules())


def test_a_model_in_training_mode_is_captured_for_inference():
    module, x = model().train(), torch.randn(3, 4)
    assert torch.equal(capture(module, (x,))(x), copy.deepcopy(module).eval()(x))


def test_weights_and_inputs_are_not_changed():
    module, x = model(), torch.randn(3, 4)
    state, kept = copy.deepcopy(module.state_dict()), x.clone()
    capture(module, (x,))
    assert torch.equal(x, kept) and all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


# -- errors: one sentence that names what is wrong ---------------------------------------------------------------------


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_wrong_shapes():
    with pytest.raises(CaptureError) as error:
        capture(model(), (torch.randn(2, 5),))
    assert "cannot capture Residual with these example inputs" in message(error)


@pytest.mark.parametrize("args, kwargs, part", [((), {}, "'x'"), ((1, 2, 3), {}, "too many"), ((1,), {"z": 1}, "'z'")])
def test_wrong_arguments(args, kwargs, part):
    with pytest.raises(CaptureError) as error:
        capture(model(), args, example_kwargs=kwargs)
    assert "do not fit Residual.forward(x, y=None, *, scale=None)" in message(error) and part in message(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value):
    module = model()
    with torch.no_grad():
        module.second.weight[1, 2] = value
    with pytest.raises(CaptureError) as error:
        capture(module, (torch.randn(2, 4),))
    assert message(error).startswith("weight 'second.weight' holds NaN or infinite values; repair")


def test_buffers_that_are_not_finite():
    module = model()
    module.register_buffer("mean", torch.tensor([0.0, float("nan")]))
    with pytest.raises(CaptureError, match="weight 'mean' holds NaN"):
        capture(module, (torch.randn(2, 4),))


@pytest.mark.parametrize("thing", [torch.relu, "unet", None, {"weight": torch.ones(1)}])
def test_not_a_module(thing):
    with pytest.raises(CaptureError) as error:
        capture(thing, (torch.randn(2, 4),))
    assert f"cannot capture a {type(thing).__name__}: pass a torch.nn.Module" in message(error)


def test_a_class_instead_of_a_model_is_not_a_module():
    with pytest.raises(CaptureError, match="cannot capture a type"):
        capture(Residual, (torch.randn(2, 4),))


def test_a_model_that_export_cannot_follow():
    class Branches(nn.Module):
        def forward(self, x):
            return x.sin() if bool(x.sum() > 0) else x.cos()

    with pytest.raises(CaptureError) as error:
        capture(Branches(), (torch.randn(2, 4),))
    assert "cannot capture Branches with these example inputs" in message(error)
