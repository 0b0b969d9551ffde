"""The temporal block as a function of the timestep and of class labels: one row for every pair."""

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import tfmq_fx
from tests.models import ClassDenoiser, relative
from tfmq_fx import QuantizationConfig, ReconstructionConfig
from tfmq_fx.diagnostics import temporal_features
from tfmq_fx.errors import ConfigError, TimestepError
from tfmq_fx.fake_quantizers import quantizers_of
from tfmq_fx.observers import TimestepObserver
from tfmq_fx.passes.analysis import find_temporal_block, row_columns

TIMESTEPS = [900, 500, 20]
CLASSES = 4


def class_denoiser():
    torch.manual_seed(0)
    return ClassDenoiser().eval()


def inputs(count=6, labels=None, seed=0):
    torch.manual_seed(seed)
    return {
        "sample": torch.randn(count, 1, 8, 8),
        "timestep": torch.tensor(TIMESTEPS)[torch.arange(count) % len(TIMESTEPS)],
        "class_labels": torch.arange(count) % CLASSES if labels is None else torch.tensor(labels),
    }


def prepared(finite=("class_labels",), **changes):
    captured = tfmq_fx.capture(class_denoiser(), example_kwargs=inputs())
    config = QuantizationConfig(**{"weight_bits": 4, "activation_groups": 1, **changes})
    graph = tfmq_fx.prepare(captured, config, timesteps=TIMESTEPS, finite=finite)
    tfmq_fx.calibrate(graph, [inputs(6, [2, 0, 2, 2, 0, 2]) if isinstance(finite, dict) else inputs()], progress=False)
    return graph


def quantized(finite=("class_labels",), **changes):
    return tfmq_fx.convert(prepared(finite, **changes))


def error(program, **options):
    with torch.no_grad():
        return relative(program(**inputs(**options)), class_denoiser()(**inputs(**options)))


def test_every_pair_has_parameters_of_its_own():
    graph = prepared()
    columns = row_columns(graph)
    assert list(columns) == ["timestep", "class_labels"]
    pairs = list(zip(columns["timestep"].tolist(), columns["class_labels"].tolist(), strict=True))
    assert pairs == [(t, c) for t in TIMESTEPS for c in range(CLASSES)]
    observers = [module for module in graph.modules() if isinstance(module, TimestepObserver)]
    assert len(observers) >= 3 and all(len(o.seen) == len(pairs) and bool(o.seen.all()) for o in observers)
    # What follows the labels sees another range for each of them, what stands before them does not.
    spread = [o.high.reshape(len(TIMESTEPS), CLASSES).amax(1) - o.high.reshape(len(TIMESTEPS), CLASSES).amin(1)
              for o in observers]  # fmt: skip
    assert any(bool((s > 1e-3).all()) for s in spread) and any(bool((s == 0).all()) for s in spread)


def test_without_the_labels_only_the_time_embed_is_indexed():
    program = quantized(())
    assert program.finite == {} and list(program.indexed) == ["timestep"]
    assert len(find_temporal_block(program.graph_module).embedding_layers) == 0
    whole = quantized()
    assert whole.finite["class_labels"].tolist() == list(range(CLASSES))
    assert len(find_temporal_block(whole.graph_module).embedding_layers) >= 2


@pytest.mark.parametrize("temporal", ["fsc", "cache", "auto"])
def test_no_temporal_layer_runs_after_lowering(temporal):
    program = quantized(temporal=temporal)
    denoiser = tfmq_fx.lower(program, backend="reference")
    assert denoiser.report.temporal_layers == 0
    compiled = denoiser._compiled[0].runs[-1]
    assert not [node for node in compiled.graph.nodes if node.target is torch.ops.aten.embedding.default]
    with torch.no_grad():
        ours, theirs = denoiser(**inputs(seed=1)), program(**inputs(seed=1))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert error(program) < 0.2


def test_labels_that_were_not_named_are_refused_by_name():
    program = quantized({"class_labels": [2, 0]})
    denoiser = tfmq_fx.lower(program, backend="reference", unknown_timestep="error")
    assert torch.isfinite(denoiser(**inputs(3, [2, 0, 2]))).all()
    for run in (program, denoiser):
        with pytest.raises(TimestepError, match=r"class_labels 3 is not among the 2 values in the table; .* finite="):
            run(**inputs(2, [2, 3]))
    with pytest.raises(TimestepError, match="timestep 7 is not in the table of 3 timesteps"):
        denoiser(**{**inputs(2, [2, 0]), "timestep": 7})


def test_it_saves_and_loads(tmp_path):
    program = quantized({"class_labels": [2, 0]})
    loaded = tfmq_fx.load(tfmq_fx.save(program, tmp_path / "program"))
    assert loaded.finite["class_labels"].tolist() == [2, 0] and loaded.timesteps.tolist() == TIMESTEPS
    with torch.no_grad():
        ask = tuple(inputs(3, [2, 0, 2]).values())
        assert torch.equal(loaded(*ask), program(*ask))


def test_new_timesteps_get_a_row_for_every_label():
    program = quantized()
    more = tfmq_fx.add_timesteps(program, [7])
    assert len(row_columns(more.graph_module)["timestep"]) == (len(TIMESTEPS) + 1) * CLASSES
    with torch.no_grad():
        assert torch.equal(more(**inputs()), program(**inputs()))
        asked = {**inputs(), "timestep": torch.full((6,), 7)}
        captured = tfmq_fx.capture(class_denoiser(), example_kwargs=inputs())
        fresh = tfmq_fx.prepare(
            captured,
            QuantizationConfig(weight_bits=4, activation_groups=1),
            timesteps=[*TIMESTEPS, 7],
            finite=("class_labels",),
        )
        tfmq_fx.calibrate(fresh, [inputs()], progress=False)
        assert torch.equal(more(**asked), tfmq_fx.convert(fresh)(**asked))


def test_tiar_learns_over_all_pairs():
    def features(program):
        found = [temporal_features(program, TIMESTEPS, fixed={"class_labels": c})
                 for c in range(CLASSES)]  # fmt: skip
        return torch.cat([torch.cat(f.values, 1) for f in found])

    captured = tfmq_fx.capture(class_denoiser(), example_kwargs=inputs())
    original = features(captured)
    graph = prepared()
    nearest = relative(features(tfmq_fx.convert(graph)), original)
    config = ReconstructionConfig(granularity="none", temporal_iterations=400)
    report = tfmq_fx.reconstruct(graph, config=config, progress=False)
    assert report.units[0].after < 0.5 * report.units[0].before
    assert relative(features(tfmq_fx.convert(graph)), original) < 0.8 * nearest
    assert all(bool(q.seen.all()) for q in quantizers_of(graph).values() if hasattr(q, "seen"))


def test_with_many_pairs_tiar_learns_from_a_sample(monkeypatch):
    monkeypatch.setattr("tfmq_fx.reconstruction.time_path.MOST_ENTRIES", 5)
    graph = prepared()
    before = {name: q.high.clone() for name, q in quantizers_of(graph).items() if hasattr(q, "seen")}
    config = ReconstructionConfig(granularity="none", temporal_iterations=50)
    tfmq_fx.reconstruct(graph, config=config, progress=False)
    assert all(bool((q.high > 0).any()) for q in quantizers_of(graph).values() if hasattr(q, "seen"))
    assert not before or all(len(high) == len(TIMESTEPS) * CLASSES for high in before.values())
    assert error(tfmq_fx.convert(graph)) < 0.2


def test_inputs_that_cannot_index_a_table_are_refused():
    captured = tfmq_fx.capture(class_denoiser(), example_kwargs=inputs())
    with pytest.raises(ConfigError, match="finite='labels' is no input of the model; its inputs are sample, timestep"):
        tfmq_fx.prepare(captured, timesteps=TIMESTEPS, finite=("labels",))
    with pytest.raises(
        ConfigError, match="the values of the finite input 'sample' are not known: give them as finite="
    ):
        tfmq_fx.prepare(captured, timesteps=TIMESTEPS, finite=("sample",))
    with pytest.raises(ConfigError, match="the values of the finite input 'class_labels' are not known"):
        tfmq_fx.prepare(captured, timesteps=TIMESTEPS, finite={"class_labels": []})


def test_a_string_is_one_finite_input():
    graph = prepared("class_labels")
    assert list(row_columns(graph)) == ["timestep", "class_labels"]


@pytest.mark.parametrize(
    "finite, part",
    [
        (None, "finite=None must be names"),
        (3, "finite=3 must be names"),
        ([3], "must be names"),
        ("labels", "finite='labels' is no input"),
        ({"class_labels": [9]}, "lists 9, but 'class_labels' indexes an embedding of 4 rows"),
        ({"class_labels": [-1]}, "lists -1, .* whole numbers from 0 to 3"),
        ({"class_labels": [0.5]}, "lists 0.5"),
        ({"class_labels": 3}, "must be numbers, such as range"),
        ({"class_labels": "ab"}, "must be numbers, such as range"),
    ],
)
def test_finite_inputs_that_are_none(finite, part):
    captured = tfmq_fx.capture(class_denoiser(), example_kwargs=inputs())
    for prepare in (
        lambda: tfmq_fx.prepare(captured, timesteps=TIMESTEPS, finite=finite),
        lambda: prepare_pt2e(captured, tfmq_fx.TFMQQuantizer(timesteps=TIMESTEPS, finite=finite)),
    ):
        with pytest.raises(ConfigError, match=part):
            prepare()
