"""Artefacts that were made to do harm, with checksums that are right: none is loaded."""

import gzip
import hashlib
import json
import os
import struct
import sys
import zlib

import diffusers.models.unets.unet_2d  # noqa: F401  (what a structure may name is there already)
import pytest

import tfmq_fx
from tests.artefact.artefacts import (
    change_graph,
    change_manifest,
    inputs,
    read_graph,
    read_manifest,
    resign,
    write_graph,
)
from tests.artefact.watch import load_guarded
from tfmq_fx import ArtefactError
from tfmq_fx.artefact.layout import GRAPH, MANIFEST, TENSORS

SILU = "torch.ops.aten.silu.default"


def refused(folder):
    error = load_guarded(folder)
    assert isinstance(error, ArtefactError), "it was loaded"
    return str(error)


def graph_of(values):
    return values["graph_module"]["graph"]


def node_of(values, target=SILU):
    return next(node for node in graph_of(values)["nodes"] if node["target"] == target)


def insert_call(values, target, arguments, result="planted"):
    """Call ``target`` on what SiLU reads, and let SiLU read its result."""
    nodes = graph_of(values)["nodes"]
    silu = node_of(values)
    named = [{"name": name, "arg": arg, "kind": 1} for name, arg in arguments]
    outputs = [{"as_tensor": {"name": result}}]
    nodes.insert(
        nodes.index(silu), {"target": target, "inputs": named, "outputs": outputs, "metadata": {}, "name": result}
    )
    silu["inputs"][0]["arg"] = {"as_tensor": {"name": result}}


def reads(values):
    return node_of(values)["inputs"][0]["arg"]


def test_no_operator_opens_files(artefact, tmp_path):
    """What made the list of operators necessary: ``from_file`` maps any file, ``fill_`` then overwrites it."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine" * 64)

    def attack(values):
        arguments = [
            ("filename", {"as_string": str(victim)}), ("shared", {"as_bool": True}), ("size", {"as_int": 256}),
            ("dtype", {"as_scalar_type": 1}),
        ]  # fmt: skip
        insert_call(values, "torch.ops.aten.from_file.default", arguments, "mapped")
        fill = [("self", {"as_tensor": {"name": "mapped"}}), ("value", {"as_int": 0})]
        insert_call(values, "torch.ops.aten.fill_.Scalar", fill, "filled")

    change_graph(artefact, attack)
    assert "from_file" in refused(artefact)
    assert victim.read_bytes() == b"mine" * 64


OPERATORS = [
    "torch.ops.aten.from_file.default", "torch.ops.aten.from_file.out", "torch.ops.aten.fill_.Scalar",
    "torch.ops.aten.copy_.default", "torch.ops.aten.silu_.default", "torch.ops.aten.silu.out",
    "torch.ops.aten.resize_.default", "torch.ops.aten.set_.source_Tensor", "torch.ops.aten.as_strided.default",
    "torch.ops.aten.as_strided_.default", "torch.ops.aten.randn_like.default", "torch.ops.aten.bernoulli.default",
    "torch.ops.aten.dropout.default", "torch.ops.aten.rand_like.default", "torch.ops.aten.item.default",
    "torch.ops.aten.empty_like.default", "torch.ops.aten.pin_memory.default", "torch.ops.aten._print.default",
    "torch.ops.aten.record_stream.default", "torch.ops.aten.is_pinned.default", "torch.ops.aten.to_mkldnn.default",
    "torch.ops.aten.data.default", "torch.ops.aten._assert_async.msg", "torch.ops.aten.warn.default",
    "torch.ops.profiler._record_function_enter.default", "torch.ops.inductor._alloc_from_pool.default",
    "torch.ops.prim.device.default", "torch.ops.load_library", "torch.ops.aten.silu", "torch.ops.aten",
    "torch.ops.higher_order.cond", "torch.ops.higher_order.auto_functionalized", "torch.ops.import_module",
    "torch.os.system", "torch.load", "torch.hub.load", "torch.save", "torch.compile", "torch.package.PackageImporter",
    "torch.nn.functional.silu", "torch.utils.cpp_extension.load",
    "torch._C._jit_get_operation", "torch.set_num_threads",
    "_operator.attrgetter", "_operator.methodcaller", "_operator.itemgetter", "_operator.setitem", "_operator.call",
    "_operator.pow", "_operator.lshift", "_operator.iadd", "_operator.concat", "_operator.__loader__.load_module",
    "math.factorial", "math.comb", "math.pow", "torch.sym_sqrt", "torch.sym_sum", "builtins.eval", "builtins.print",
    "os.system", "subprocess.run", "#aoti:kernel", "#:x", "", "torch.ops.aten.silu.default.__call__",
    "torch.ops.aten.silu.default\n", "torch.ops.mylib.op.default", "torch.ops.quantized.linear.default",
    "torch.ops.debugprims.load_tensor.default", "torch.ops.streams.fork.default", "torch.ops.tfmq.image.default",
]  # fmt: skip


@pytest.mark.parametrize("target", OPERATORS)
def test_operators_that_are_not_on_the_list(artefact, target):
    change_graph(artefact, lambda values: node_of(values).update(target=target))
    assert "no quantized denoiser contains" in refused(artefact)


CANARY = "tfmq_canary"
LEAF = {"type": None, "context": None, "children_spec": []}


def spec(kind, context, *children):
    return json.dumps([1, {"type": kind, "context": context, "children_spec": list(children)}])


def default_dict(module):
    context = {"default_factory_module": module, "default_factory_name": "list", "dict_context": ["x"]}
    return spec("collections.defaultdict", json.dumps(context), LEAF)


SPECS = {
    "a dictionary that imports a module": default_dict(CANARY),
    "the same, as an object": json.dumps(
        [1, {"type": "collections.defaultdict", "context": {"default_factory_module": CANARY}, "children_spec": [LEAF]}]
    ),
    "an enumeration that imports a module": spec(
        "builtins.dict", json.dumps([{"__enum__": True, "fqn": f"{CANARY}:X", "name": "A"}]), LEAF
    ),
    "an enumeration in a tuple": spec(
        "builtins.tuple", json.dumps({"__enum__": True, "fqn": f"{CANARY}:X", "name": "A"}), LEAF
    ),
    "a class of a module that is not imported": spec(f"{CANARY}.Output", '["sample"]', LEAF),
    "a class of diffusers that is no output": spec("diffusers.models.unets.unet_2d.UNet2DModel", "[]", LEAF),
    "a module of diffusers that does not exist": spec(f"diffusers.models.{CANARY}.FooOutput", '["sample"]', LEAF),
    "a path out of diffusers": spec("diffusers.models...os.FooOutput", '["sample"]', LEAF),
    "a pipeline of diffusers": spec(
        "diffusers.pipelines.latte.pipeline_latte.LattePipelineOutput", '["frames"]', LEAF
    ),
    "a field that an output does not have": spec(
        "diffusers.models.unets.unet_2d.UNet2DOutput", '["__class__"]', LEAF
    ),
    "a deque": spec("collections.deque", "null", LEAF),
    "a named tuple": spec("collections.namedtuple", '"tfmq"', LEAF),
    "a partial": spec("functools.partial", "[]", LEAF),
    "a set": spec("builtins.set", "null", LEAF),
    "a key that ends a quotation": spec("builtins.dict", json.dumps(["x':__import__('os').abort(),'y"]), LEAF),
    "a context that is no JSON": spec("builtins.tuple", "__import__('os')", LEAF),
    "too few keys": spec("builtins.dict", "[]", LEAF),
    "two equal keys": spec("builtins.dict", '["x", "x"]', LEAF, LEAF),
    "a leaf with children": spec(None, None, LEAF),
    "another protocol": json.dumps([2, LEAF]),
    "no protocol": json.dumps(LEAF),
    "no JSON": "[1, {",
    "deep nesting": "[1, " + '{"type": "builtins.tuple", "context": "null", "children_spec": [' * 500
    + json.dumps(LEAF) + "]}" * 500 + "]",
    "bottomless nesting": "[" * 100_000,
    "an inner dictionary that imports": spec(
        "builtins.tuple", "null", json.loads(default_dict(CANARY))[1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", ["out_spec", "in_spec"])
@pytest.mark.parametrize("kind", SPECS)
def test_structures(artefact, tmp_path, monkeypatch, kind, where):
    """None of them imports the module that it names, though it is there."""
    (tmp_path / f"{CANARY}.py").write_text("X = list")
    monkeypatch.syspath_prepend(tmp_path)

    def change(values):
        values["graph_module"]["module_call_graph"][0]["signature"][where] = SPECS[kind]

    change_graph(artefact, change)
    refused(artefact)
    assert CANARY not in sys.modules


EXPRESSIONS = [
    "9**9**9**9", "Pow(9, Pow(9, 9))", "Integer(9)**Integer(99999999)", "Mul(" * 90 + "Integer(2)" + ")" * 90,
    "Integer(" + "9" * 5000 + ")", "Integer(99999999999)", "Symbol('s0')**9", "__import__('os').system('true')",
    "Symbol('s0', positive=True).__class__", "Symbol('__import__')", "s0", "9", "", "Max(Symbol('s0'), Integer(1))",
    "Add(*[Integer(1)])", "Symbol('s0', integer=[])", "(lambda: 9)()", "Integer(9" * 30, "\x00", "Symbol('u0')",
    "Add(" + ", ".join(["Integer(1)"] * 40) + ")", "FloorDiv(Integer(1), Integer(0))", "Integer(True)",
]  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_size_expressions(artefact, text):
    def change(values):
        sizes = graph_of(values)["tensor_values"]["sample"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

    change_graph(artefact, change)
    assert "size expression" in refused(artefact)


CODE = "x): __import__('os').abort() #"
NAMES = {
    "a value": lambda v: node_of(v)["outputs"].__setitem__(0, {"as_tensor": {"name": CODE}}),
    "a node": lambda v: node_of(v).update(name=CODE),
    "a word of Python": lambda v: node_of(v).update(name="lambda"),
    "an argument of the program": lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(
        forward_arg_names=["sample", CODE]
    ),
    "an argument twice": lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(
        forward_arg_names=["sample", "sample"]
    ),
    "an argument of a call": lambda v: node_of(v)["inputs"][0].update(name=CODE),
    "an argument that the operator does not have": lambda v: node_of(v)["inputs"][0].update(name="out"),
    "a module stack": lambda v: node_of(v)["metadata"].update(nn_module_stack=f"a,b\n{CODE},c"),
    "an input": lambda v: v["graph_module"]["signature"]["input_specs"][0]["parameter"]["arg"].update(name=CODE),
    "a value of another node": lambda v: node_of(v)["outputs"].__setitem__(0, {"as_tensor": {"name": "sample"}}),
}
TENSOR_NAMES = [
    "__class__.x",
    "forward",
    "_parameters.x",
    "graph",
    "a b",
    'x"), exec("',
    "a..b",
    "state_dict",
    "a.__dict__.b",
]


@pytest.mark.parametrize("where", NAMES)
def test_names_that_would_be_code(artefact, where):
    change_graph(artefact, NAMES[where])
    refused(artefact)


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_names_of_tensors(artefact, name):
    """The tensor is there under that name too."""
    data = (artefact / TENSORS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[name] = header.pop("time.bias")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (artefact / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    def rename(manifest):
        manifest["tensors"][name] = manifest["tensors"].pop("time.bias")
        manifest["parameters"] = [name if old == "time.bias" else old for old in manifest["parameters"]]

    change_manifest(artefact, rename)
    spec = "parameter"

    def change(values):
        for given in values["graph_module"]["signature"]["input_specs"]:
            if given.get(spec, {}).get("parameter_name") == "time.bias":
                given[spec]["parameter_name"] = name

    change_graph(artefact, change)
    assert "is called" in refused(artefact)


def with_argument(value):
    return lambda values: node_of(values)["inputs"][0].update(arg=value)


ARGUMENTS = {
    "a subgraph": with_argument({"as_graph": {"name": "g", "graph": {}}}),
    "a custom object": with_argument({"as_custom_obj": {"name": "x", "class_fqn": "y"}}),
    "an operator": with_argument({"as_operator": "torch.os.system"}),
    "texts": with_argument({"as_strings": ["a"]}),
    "a dictionary": with_argument({"as_string_to_argument": {}}),
    "a text": with_argument({"as_string": "/etc/passwd"}),
    "a complex number": with_argument({"as_complex": {"real": 1.0, "imag": 0.0}}),
    "another device": with_argument({"as_device": {"type": "cuda", "index": 0}}),
    "another layout": with_argument({"as_layout": 1}),
    "no dtype": with_argument({"as_scalar_type": 99}),
    "no memory format": with_argument({"as_memory_format": -1}),
    "an unknown value": with_argument({"as_tensor": {"name": "nowhere"}}),
    "a later value": with_argument({"as_tensor": {"name": "add"}}),
    "a number without end": with_argument({"as_int": 10**30}),
    "two things at once": with_argument({"as_int": 1, "as_none": True}),
    "nothing at all": with_argument({}),
    "an activation that gelu does not have": lambda v: node_of(v, "torch.ops.aten.gelu.default")["inputs"][1].update(
        arg={"as_string": "file"}
    ),
    "attention that drops": lambda v: insert_call(
        v, "torch.ops.aten.scaled_dot_product_attention.default",
        [(name, reads(v)) for name in ("query", "key", "value")] + [("dropout_p", {"as_float": 0.5})],
    ),
    "a norm that trains": lambda v: insert_call(
        v, "torch.ops.aten.batch_norm.default",
        [("input", reads(v)),
         *((name, {"as_none": True}) for name in ("weight", "bias", "running_mean", "running_var")),
         ("training", {"as_bool": True}), ("momentum", {"as_float": 0.1}), ("eps", {"as_float": 0.1}),
         ("cudnn_enabled", {"as_bool": False})],
    ),
    "a call without a result": lambda v: node_of(v).update(outputs=[]),
    "shapes that do not fit": lambda v: insert_call(
        v, "torch.ops.aten.reshape.default", [("self", reads(v)), ("shape", {"as_ints": [7, 11]})]
    ),
    "a mutated input": lambda v: v["graph_module"]["signature"]["input_specs"].append(
        {"custom_obj": {"arg": {"name": "x", "class_fqn": "y"}, "custom_obj_name": "z"}}
    ),
    "a token": lambda v: v["graph_module"]["signature"]["input_specs"].append({"token": {"arg": {"name": "x"}}}),
    "too many inputs": lambda v: v["graph_module"]["signature"]["input_specs"].append(
        {"constant_input": {"name": "x", "value": {"as_none": True}}}
    ),
    "a result twice": lambda v: graph_of(v)["outputs"].append(graph_of(v)["outputs"][0]),
    "a result that is a list": lambda v: graph_of(v)["outputs"].__setitem__(0, {"as_ints": [1]}),
    "another torch": lambda v: v["schema_version"].update(major=99),
    "a huge input": lambda v: graph_of(v)["tensor_values"]["sample"]["sizes"].__setitem__(1, {"as_int": 2**62}),
    "an input of another dtype": lambda v: graph_of(v)["tensor_values"]["p_time_bias"].update(dtype=8),
    "a weight of another shape": lambda v: graph_of(v)["tensor_values"]["p_time_bias"]["sizes"].__setitem__(
        0, {"as_int": 8}
    ),
    "a size without a hint": lambda v: graph_of(v)["tensor_values"]["sample"]["sizes"].__setitem__(
        0, {"as_expr": {"expr_str": "Symbol('s0')", "hint": None}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_and_inputs(artefact, kind):
    change_graph(artefact, ARGUMENTS[kind])
    refused(artefact)


def test_guards_and_metadata_of_the_file_are_not_read(artefact, wanted):
    """torch compiles guards from such a text; what the schema does not name does not reach it."""

    def change(values):
        values["guards_code"] = ["__import__('os').abort()"]
        values["verifiers"] = ["../../evil"]
        values["graph_module"]["metadata"] = {"custom": "[" * 10}
        values["graph_module"]["treespec_namedtuple_fields"] = {"x": 1}
        graph_of(values)["tensor_values"]["silu"] = {"dtype": "wrong"}
        node_of(values)["metadata"].update(
            stack_trace="x", source_fn_stack="x,torch.os.system", from_node="[", custom="{"
        )

    change_graph(artefact, change)
    loaded = load_guarded(artefact)
    assert loaded(*inputs()).equal(wanted)


# -- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [10, 2**26, 2**33])
def test_a_file_that_expands_without_end(artefact, claimed):
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = stream.compress(b" " * 2**24) + stream.flush(zlib.Z_FULL_FLUSH)
    # Three GiB of spaces: what was flushed can be repeated.
    data = gzip.compress(b"")[:10] + part * 192 + stream.flush()
    assert len(data) < 4 * 2**20
    (artefact / GRAPH).write_bytes(data)
    change_manifest(artefact, lambda m: m["files"][GRAPH].update(expanded=claimed))
    resign(artefact)
    refused(artefact)


TEXTS = {
    "deep lists": b"[" * 10**6,
    "deep objects": b'{"a":' * 10**6,
    "many objects": b"[" + b"{}," * (2**24) + b"{}]",
    "many lists": b"[" + b"[]," * (2**24) + b"[]]",
    "many numbers": b"[" + b"1," * (2**25 - 2) + b"1]",
    "a long number": b'{"graph_module": ' + b"9" * 10**6 + b"}",
    "no text": b"\xff\xfe",
    "a number": b"1",
    "null": b"null",
    "an empty object": b"{}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_graphs(artefact, kind):
    write_graph(artefact, TEXTS[kind])
    refused(artefact)


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_manifests(artefact, kind):
    (artefact / MANIFEST).write_bytes(TEXTS[kind])
    refused(artefact)


@pytest.mark.parametrize("shape", [[2**36, 1], [2**20, 2**20], [2**40, 2**40], [4, 2**30], [0, 4], [4], [], [-4, -1]])
def test_packed_shapes_are_bounded_by_what_is_there(artefact, shape):
    """64 GiB were allocated for the first, before it was compared with anything."""
    change_manifest(artefact, lambda m: m["packed"]["embed_weight_int4"].update(shape=shape))
    refused(artefact)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FILES = {
    "empty": b"",
    "short": b"\x01\x00",
    "a header beyond the file": struct.pack("<Q", 2**40) + b"{}",
    "a header without end": struct.pack("<Q", 2**63) + b"{}",
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "a tensor beyond the file": header(x=tensor(shape=(2**30,), offsets=(0, 2**32))),
    "overlapping tensors": header(x=tensor(), y=tensor()) + bytes(4),
    "a hole": header(x=tensor(offsets=(4, 8))) + bytes(8),
    "bytes at the end": header(x=tensor()) + bytes(8),
    "a shape that does not fit": header(x=tensor(shape=(3,))) + bytes(4),
    "an unknown dtype": header(x=tensor("C64")) + bytes(4),
    "offsets turned round": header(x=tensor(offsets=(4, 0))) + bytes(4),
    "negative offsets": header(x=tensor(offsets=(-4, 0))) + bytes(4),
    "a shape of overflow": header(x=tensor(shape=(2**32, 2**32, 0), offsets=(0, 0))),
    "three offsets": header(x=tensor(offsets=(0, 4, 8))) + bytes(4),
    "metadata alone": struct.pack("<Q", 16) + b'{"__metadata__":' + b"1}",
    "an entry without a shape": header(x={"dtype": "F32", "data_offsets": [0, 4]}) + bytes(4),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_tensors(artefact, kind):
    (artefact / TENSORS).write_bytes(FILES[kind])
    change_manifest(artefact, lambda m: m.update(tensors={"x": [[1], "float32"]}))
    resign(artefact)
    refused(artefact)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "manifest.json", ".", "", "tensors.safetensors/..", "x\x00"]
)
def test_files_of_other_names_are_not_opened(artefact, name):
    (artefact.parent / "secret").write_bytes((artefact / TENSORS).read_bytes())
    change_manifest(artefact, lambda m: m["files"][TENSORS].update(name=name))
    assert "'files'" in refused(artefact)


def test_a_folder_or_a_pipe_in_place_of_a_file(artefact):
    (artefact / TENSORS).unlink()
    os.mkfifo(artefact / TENSORS)
    assert TENSORS in refused(artefact)
    (artefact / TENSORS).unlink()
    (artefact / TENSORS).mkdir()
    assert TENSORS in refused(artefact)


def test_what_was_checked_is_what_is_used(artefact, wanted):
    """Files were mapped into memory: a change afterwards changed the model, a truncation ended the process."""
    loaded = tfmq_fx.load(artefact)
    for name in (TENSORS, GRAPH, MANIFEST):
        with (artefact / name).open("r+b") as file:
            file.write(b"\xff" * 2000)
            file.truncate(10)
    assert loaded(*inputs()).equal(wanted)


def test_every_part_of_the_graph_is_needed(artefact):
    """The attacks above start from a graph that loads; without any of its fields it does not."""
    assert set(read_graph(artefact)) == {"schema_version", "range_constraints", "graph_module"}
    digest = hashlib.sha256((artefact / GRAPH).read_bytes()).hexdigest()
    assert read_manifest(artefact)["files"][GRAPH]["sha256"] == digest


@pytest.mark.parametrize("field", ["model_class", "config", "parameters", "max_batch", "route"])
def test_every_field_of_the_interface_is_needed(artefact, field):
    change_manifest(artefact, lambda m: m["interface"].pop(field))
    assert field in refused(artefact)


def test_a_table_whose_timesteps_are_left_out(artefact):
    change_manifest(artefact, lambda m: m.update(timesteps=None))
    assert "has a table of timesteps and the manifest has none" in refused(artefact)
