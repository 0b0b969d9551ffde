"""The temporal block as a program of its own: the two parts are the whole, at any timestep, with exact parameters."""

import copy
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tfmq_fx
from tests.conditional_cases import BATCHES
from tests.conditional_cases import prepared as prompted
from tests.models import TIMESTEPS, SmallDenoiser, batch, small_denoiser, tiny_unet
from tests.temporal.test_inputs import inputs as labelled
from tests.temporal.test_inputs import quantized as with_labels
from tfmq_fx import QuantizationConfig
from tfmq_fx.errors import TimestepError
from tfmq_fx.passes import IndexTimesteps, PassError
from tfmq_fx.passes.analysis import row_lookups
from tfmq_fx.passes.temporal.group_timesteps import EACH_TIMESTEP, GROUPS, find_groups
from tfmq_fx.temporal.program import TemporalProgram
from tfmq_fx.temporal.split import split_temporal
from tfmq_fx.testing import GraphBuilder, temporal_graphs

aten = torch.ops.aten
NEW = [55, 777, 3, 901]


def made(model=None, timesteps=TIMESTEPS, given=None, **config):
    return tfmq_fx.quantize(
        model or small_denoiser(), QuantizationConfig(**config), [given or batch()], timesteps=timesteps, progress=False
    )


class InTwoParts:
    """A program cut in two, called with its inputs by name."""

    def __init__(self, program, unknown="extend", **options):
        self.split = split_temporal(program.graph_module, program.timestep, program.timesteps)
        self.time = TemporalProgram(
            self.split.time, self.split.names, self.split.layers, self.split.inputs,
            timesteps=program.timesteps, unknown=unknown, **options,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, *leaves, **named):
        names = [str(node.target) for node in self.split.rest.graph.find_nodes(op="placeholder")]
        values = {**dict(zip(names, leaves, strict=False)), **named}
        computed = self.time(*(values[name] for name in self.split.names))
        values.update(zip([entry.name for entry in self.split.inputs], computed, strict=True))
        return self.split.rest(*(values[name] for name in names))[0]


CONFIGS = [
    {}, {"weight_bits": 4}, {"temporal": "shared"}, {"temporal": "observed"}, {"temporal": "float"},
    {"activation_groups": 3}, {"temporal": "float", "activation_groups": 2}, {"activation_groups": 10},
]  # fmt: skip
TABLES = [
    {"temporal": "cache"},
    {"temporal": "cache", "table": "float16"},
    {"temporal": "auto", "activation_groups": 3},
]


# --- the two parts are the whole ----------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CONFIGS, *TABLES], ids=str)
def test_the_parts_are_the_program(config):
    program, (x, t) = made(**config), batch()
    parts = InTwoParts(program)
    with torch.no_grad():
        assert torch.equal(parts(x, t), program(x, t))
    # Nothing of the table, and no linear of the block, is left in what is compiled.
    rest = parts.split.rest
    assert not row_lookups(rest)
    names = {name for name, _ in (*rest.named_parameters(), *rest.named_buffers())}
    assert not any(name.startswith(("time", "down.embed", "up.embed", "temporal")) for name in names)


def test_neither_part_copies_a_tensor():
    program = made()
    parts = InTwoParts(program).split
    own = {id(value) for value in (*program.graph_module.parameters(), *program.graph_module.buffers())}
    for part in (parts.time, parts.rest):
        read = {str(node.target) for node in part.graph.find_nodes(op="get_attr")}
        assert read and all(id(value) in own for name, value in part.named_parameters() if name in read)
        assert all(id(value) in own for name, value in part.named_buffers() if name in read)


def test_groups_are_found_where_they_are_inputs():
    rest = InTwoParts(made(activation_groups=3)).split.rest
    assert find_groups(rest, GROUPS).op == "placeholder" and find_groups(rest, EACH_TIMESTEP) is None


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_a_batch_may_be_symbolic_or_fixed_and_a_timestep_a_single_one(dynamic, single):
    x, t = batch()
    t = t[0] if single else t
    captured = tfmq_fx.capture(tiny_unet().eval(), (x, t), dynamic_batch=dynamic)
    prepared = tfmq_fx.prepare(captured, QuantizationConfig(activation_groups=2), timesteps=TIMESTEPS)
    tfmq_fx.calibrate(prepared, [(x, t)], progress=False)
    program = tfmq_fx.convert(prepared)
    parts, new = InTwoParts(program), torch.tensor(NEW[0]) if single else torch.tensor(NEW)
    grown = tfmq_fx.add_timesteps(program, NEW)
    with torch.no_grad():
        assert torch.equal(parts(x, t), program(x, t)[0])
        assert torch.equal(parts(x, new), grown(x, new)[0])
        if dynamic:
            assert torch.equal(parts(x[:3], t if single else t[:3]), program(x[:3], t if single else t[:3])[0])


@given(temporal_graphs(), st.data())
def test_the_parts_of_any_model_are_the_model(model, data):
    timesteps = [999, 500, 7, 3, 0]
    graph_module, name = copy.deepcopy(model.graph_module), model.path.timestep_name
    if data.draw(st.booleans()):
        IndexTimesteps(timesteps, timestep=name)(graph_module)
    split = split_temporal(graph_module, name, torch.tensor(timesteps, dtype=torch.float64))
    if not model.expected.time_embedding:
        assert split is None
        return
    program = TemporalProgram.of(split, timesteps=None, unknown="extend")
    for asked in (timesteps[:2], [7, 123]):
        leaves = model.example_inputs(asked)
        given_by_name = dict(
            zip([str(n.target) for n in graph_module.graph.find_nodes(op="placeholder")], leaves, strict=True)
        )
        with torch.no_grad():
            wanted = model.graph_module(*leaves)
            got = split.rest(*leaves, *program(*(given_by_name[name] for name in split.names)))
        for a, b in zip(got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_time_path_has_no_parts():
    builder = GraphBuilder()
    x, t = builder.placeholder("x", (2, 4)), builder.placeholder("timestep", (2,), torch.int64)
    mixed = builder.call(aten.mul.Tensor, x, builder.call(aten.unsqueeze.default, t, 1))
    graph_module = builder.build(builder.call(aten.linear.default, mixed, builder.weight("weight", (4, 4))))
    assert split_temporal(graph_module) is None
    assert split_temporal(graph_module, "t") is None


# --- timesteps outside the table ---------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_new_timestep_is_computed_as_if_it_had_been_added(config):
    program, (x, t) = made(**config), batch()
    parts, grown = InTwoParts(program), tfmq_fx.add_timesteps(program, NEW)
    added = InTwoParts(grown, "error")
    for asked in (torch.tensor(NEW), torch.tensor([55, 100, 55, 900]), t):
        assert torch.equal(parts(x, asked), added(x, asked))
        with torch.no_grad():
            assert torch.equal(parts(x, asked), grown(x, asked))


def test_what_comes_with_a_timestep_changes_nothing():
    program, (x, _) = made(), batch()
    alone, together = InTwoParts(program), InTwoParts(program)
    wanted = together(x, torch.tensor(NEW))
    for number, timestep in enumerate(NEW):
        found = alone(x, torch.full((4,), timestep))
        assert torch.equal(found[number], wanted[number])


def test_fractional_timesteps():
    x, _ = batch()
    new = torch.tensor([908.1818, 0.25, 55.5, 100.0])
    program = made(given=(x, torch.tensor([0.0, 100.0, 900.0, 500.0])))
    assert torch.equal(InTwoParts(program)(x, new), tfmq_fx.add_timesteps(program, new)(x, new).detach())


def test_labels_have_rows_of_their_own():
    program, given = with_labels(), labelled()
    parts = InTwoParts(program)
    assert parts.split.names == ("timestep", "class_labels")
    with torch.no_grad():
        assert torch.equal(parts(**given), program(**given))
        new = {**given, "timestep": torch.tensor([900, 123, 321, 20, 20, 123])}
        assert torch.equal(parts(**new), tfmq_fx.add_timesteps(program, [123, 321])(**new))
    with pytest.raises(TimestepError, match="class_labels 7 is not among the 4 values"):
        parts(**{**given, "class_labels": torch.full((6,), 7)})


def test_a_prompts_layers_take_the_parameters_of_the_nearest_timestep():
    program, new = tfmq_fx.convert(prompted()), torch.tensor([0, 151, 349, 900, 88])
    parts = InTwoParts(program)
    assert [entry.matrix for entry in parts.split.inputs] == [False, True]
    sample, _, tokens, pooled = BATCHES[0]
    given = {"sample": sample, "timestep": new, "tokens": tokens, "pooled": pooled}
    with torch.no_grad():
        assert torch.equal(parts(**given), tfmq_fx.add_timesteps(program, [151, 349, 88])(**given))


@pytest.mark.parametrize("config", TABLES, ids=str)
def test_rows_alone_serve_no_other_timestep_and_say_so(config):
    parts = InTwoParts(made(**config))
    words = "timestep 55 is not among the 10 whose features this program has .*no temporal block.*temporal='fsc'"
    with pytest.raises(TimestepError, match=words) as caught:
        parts.time.resolve(torch.tensor([100, 55]))
    assert "\n" not in str(caught.value) and not parts.time.has_block
    nearest = InTwoParts(made(**config), "nearest")
    assert nearest.time.resolve(torch.tensor([120, 55])).tolist() == [100, 100]


def test_the_policies():
    program = made()
    assert InTwoParts(program, "extend").time.resolve(torch.tensor([120.0, 100.0001])).tolist() == [120, 100]
    assert InTwoParts(program, "nearest").time.resolve(torch.tensor([120, 161])).tolist() == [100, 200]
    with pytest.raises(TimestepError, match="timestep 120 is not in the table of 10 timesteps"):
        InTwoParts(program, "error").time.resolve(torch.tensor([100, 120]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-42])
def test_what_is_no_timestep_is_refused(value):
    time = InTwoParts(made()).time
    with pytest.raises(TimestepError):
        time.resolve(torch.tensor([100.0, value], dtype=torch.float64))
    with pytest.raises(TimestepError, match=r"timestep 0\.5 is fractional, but the model was captured with int64"):
        time.resolve(torch.tensor(0.5))


class Logarithm(SmallDenoiser):
    """One that takes the logarithm of its timestep."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep.float().log())


def test_a_timestep_at_which_the_block_is_not_finite_is_named():
    torch.manual_seed(0)
    x, _ = batch()
    program = made(Logarithm().eval(), timesteps=[1, 10, 100], given=(x, torch.tensor([1, 10, 100, 1])))
    with pytest.raises(TimestepError, match=r"input of 'time.one' holds NaN or infinite values at timestep 0"):
        InTwoParts(program)(x, torch.tensor([1, 0, 10, 0]))


class Together(SmallDenoiser):
    """One whose timesteps see each other."""

    def forward(self, sample, timestep):
        t = timestep.float()
        return super().forward(sample, t + t.cumsum(0))


def test_timesteps_that_see_each_other_cannot_be_cut_out():
    torch.manual_seed(0)
    program = made(Together().eval(), temporal="float")
    with pytest.raises(PassError, match=r"do not each depend on their own timestep alone; keep .*tabulate=False"):
        split_temporal(program.graph_module, "timestep", program.timesteps)


# --- what is kept -------------------------------------------------------------------------------------


def test_a_timestep_is_computed_once():
    parts, (x, t) = InTwoParts(made()), batch()
    parts(x, t)
    assert parts.time.computed == len(set(t.tolist()))
    parts(x, t)
    parts(x[:2], torch.tensor([55, 55]))
    parts(x[:2], torch.tensor([55, int(t[0])]))
    assert parts.time.computed == len(set(t.tolist())) + 1


def test_memory_is_bounded_and_what_gave_way_is_computed_again():
    program, (x, _) = made(), batch()
    few, all_kept = InTwoParts(program, most_bytes=200), InTwoParts(program)
    for timestep in (*range(1, 9), 1, 100, 1):
        t = torch.full((4,), timestep)
        assert torch.equal(few(x, t), all_kept(x, t))
    assert few.time.computed > all_kept.time.computed == 9
    assert few.time._cache.nbytes <= 200


def test_two_threads_compute_nothing_twice():
    parts, (x, _) = InTwoParts(made()), batch()
    wanted, wrong = {}, []

    def serve_alone():
        # In a thread as well: a new one has the process's own number of cores, whatever this one was told.
        alone = InTwoParts(made())
        wanted.update((t, alone(x, torch.full((4,), t))) for t in (5, 6, 7))

    first = threading.Thread(target=serve_alone)
    first.start()
    first.join()

    def serve():
        for t in (5, 6, 7, 5, 6, 7):
            if not torch.equal(parts(x, torch.full((4,), t)), wanted[t]):
                wrong.append(t)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and parts.time.computed == 3


def test_a_stored_precision_rounds_features_as_a_table_would():
    program, (x, t) = made(), batch()
    plain, rounded = InTwoParts(program), InTwoParts(program, storage="int8")
    wanted = tfmq_fx.lower(made(table="int8", unknown_timestep="error"), "reference")(x, t)
    assert torch.allclose(rounded(x, t), wanted, atol=1e-5)
    assert not torch.allclose(plain(x, t), wanted, atol=1e-5)
