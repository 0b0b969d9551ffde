"""Artefacts with something changed: refused, or the program that was saved."""

import copy
import json
import random

import pytest

from tests.artefact.artefacts import change_manifest, inputs, read_graph, read_manifest, write_graph
from tests.artefact.watch import load_guarded
from tfmq_fx import ArtefactError
from tfmq_fx.artefact.layout import GRAPH, MANIFEST, TENSORS

VALUES = (None, "x", -1, 0, 2**70, 1.5, True, [], {}, [[[]]], {"a": {"b": 1}}, "9" * 300, float("nan"), [None])
#: What a manifest may say otherwise: words for people, and the settings of what is still to come.
FREE = {"versions", "scheduler", "interface", "kept_float", "layers", "temporal_choices", "config"}
#: Calls of the graph may have other arguments: that is another program, and its checksums say that it was meant.
OTHER_PROGRAM = {
    "arg",
    "kind",
    "nodes",
    "outputs",
    "metadata",
    "max_val",
    "min_val",
    "hint",
    "strides",
    "minor",
    "persistent",
}


def positions(values, path=()):
    """Where in ``values`` something stands, outermost first."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from positions(value, (*path, key))


def parent(values, path):
    for key in path[:-1]:
        values = values[key]
    return values


def changed(values, path, value):
    other = copy.deepcopy(values)
    parent(other, path)[path[-1]] = value
    return other


def without(values, path):
    other = copy.deepcopy(values)
    del parent(other, path)[path[-1]]
    return other


def check(folder, wanted, same):
    """Load; whether it was refused. What is loaded is the same program where it has to be."""
    loaded = load_guarded(folder)
    if isinstance(loaded, ArtefactError):
        return True
    result = loaded(*inputs())
    assert not same or result.equal(wanted)
    return False


def run(artefact, wanted, cases, write):
    refused = total = 0
    for path, values, free in cases:
        total += 1
        write(artefact, values)
        try:
            refused += check(artefact, wanted, same=not free)
        except BaseException as error:
            error.add_note(f"changed: {path}")
            raise
    return refused, total


def write_manifest(folder, values):
    (folder / MANIFEST).write_text(json.dumps(values))


@pytest.mark.filterwarnings("ignore:the artefact")
def test_every_field_of_the_manifest(artefact, wanted):
    manifest = read_manifest(artefact)
    places = list(positions(manifest))
    draw = random.Random(0)
    cases = []
    for path in places:
        old = parent(manifest, path)[path[-1]]
        # Every value in place of every field, and some in place of what is in them.
        for value in VALUES if len(path) == 1 else draw.sample(VALUES, 2):
            # What is free text costs a whole load each time: a sample is enough.
            if (type(value), value) != (type(old), old) and (
                path[0] not in FREE or len(path) == 1 or draw.random() < 0.15
            ):
                cases.append((path, changed(manifest, path, value), False))
        if path[0] not in FREE or len(path) == 1:
            cases.append((path, without(manifest, path), False))
    cases += [
        (("extra",), {**manifest, "extra": 1}, False),
        (("format_version",), {**manifest, "format_version": 2}, False),
    ]
    refused, total = run(artefact, wanted, cases, write_manifest)
    assert total >= 400 and refused >= total * 0.8


@pytest.mark.filterwarnings("ignore:the artefact")
def test_the_graph(artefact, wanted):
    graph = read_graph(artefact)
    draw = random.Random(1)
    cases = []
    for path in draw.sample(list(positions(graph)), 220):
        old = parent(graph, path)[path[-1]]
        values = changed(graph, path, draw.choice([v for v in VALUES if (type(v), v) != (type(old), old)]))
        if draw.random() < 0.3:
            values = without(graph, path)
        cases.append((path, values, not OTHER_PROGRAM.isdisjoint(path)))
    refused, total = run(artefact, wanted, cases, write_graph)
    assert total == 220 and refused >= total * 0.6


@pytest.mark.filterwarnings("ignore:the artefact")
@pytest.mark.parametrize("name", [MANIFEST, TENSORS, GRAPH])
def test_bytes(artefact, wanted, name):
    """Bits flipped, bytes taken out, files cut and swapped."""
    data = (artefact / name).read_bytes()
    draw = random.Random(2)
    refused = 0
    for number in range(60):
        place = draw.randrange(len(data))
        other = bytearray(data)
        if number % 3 == 0:
            other[place] ^= 1 << draw.randrange(8)
        elif number % 3 == 1:
            del other[place : place + draw.randrange(1, 9)]
        else:
            other = other[:place]
        (artefact / name).write_bytes(bytes(other))
        # A word for people may have changed in the manifest.
        refused += check(artefact, wanted, same=True)
    assert refused == 60 if name != MANIFEST else refused >= 40


def test_what_may_differ_is_loaded(artefact, wanted):
    def change(manifest):
        manifest.update(kept_float={"x": "because"}, scheduler={"a": [1]}, layers={})

    change_manifest(artefact, change)
    loaded = load_guarded(artefact)
    assert loaded(*inputs()).equal(wanted)
    assert loaded.kept_float == {"x": "because"} and loaded.scheduler == {"a": [1]}
