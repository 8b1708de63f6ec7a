"""int8 files: small, close, and relaxed where words would change."""

import shutil
from dataclasses import dataclass
from typing import Tuple

import numpy as np
import onnx
import pytest

from tests.export.conftest import tiny_model
from transducer_kd.export import onnx_files, quantise
from transducer_kd.export.compare import compare
from transducer_kd.export.folder import open_folder
from transducer_kd.export.quantise import Treatment
from transducer_kd.export.session import load_session
from transducer_kd.export.write import write_folder

ABOUT = {"phase": "small", "checkpoint": "epoch-1"}


@dataclass(frozen=True)
class Loss:
    wer_difference: float
    different: Tuple[str, ...] = ()


def good(folder, only):
    return Loss(0.0)


@pytest.fixture
def folder(las_folder, tmp_path):
    shutil.copytree(las_folder, tmp_path / "model")
    return open_folder(tmp_path / "model")


@pytest.fixture
def parts(las_model):
    return onnx_files.parts_of(las_model, las_model)


@pytest.fixture
def small(lang_dir, tmp_path):
    """Folder and parts of a model with few modules, for searches."""
    model = tiny_model(40, num_layers=1)
    return write_folder(tmp_path / "small", model, model, model.state_dict(), lang_dir, ABOUT)


def model_of(folder, part):
    return quantise._products_alone(onnx.load(str(folder.file(part, "float"))))


def kinds(model):
    return [node.op_type for node in model.graph.node]


def stored(model):
    return {weight.name: onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer}


def test_modules_are_named_as_in_pytorch(folder):
    layers = [f"encoder.layers.{i}.{name}" for i in (0, 1) for name in ("ff1", "attention", "conv", "ff2")]
    expected = ["encoder.subsampling", *layers, "encoder_proj"]
    for part in ("encoder-streaming", "encoder-offline"):
        assert quantise.modules_of(model_of(folder, part)) == expected
    assert quantise.modules_of(model_of(folder, "decoder")) == ["decoder_proj"]
    assert quantise.modules_of(model_of(folder, "joiner")) == ["joiner.output_linear"]
    found = quantise.modules_of(model_of(folder, "las"))
    assert sorted(found) == ["las.combine", "las.key_value", "las.output", "las.query"]


def test_a_treatment_decides_module_by_module(folder):
    model = model_of(folder, "encoder-streaming")
    all_products = len(kinds(model)) and kinds(quantise.quantised(model, Treatment())).count("MatMulInteger")
    # 1 of the subsampling, 8 of each layer (4 of feed-forward, 2 of attention, 2 of the convolution), 1
    # projection
    assert all_products == 1 + 2 * 8 + 1
    relaxed = quantise.quantised(
        model, Treatment({"encoder.layers.1.ff1": "weights", "encoder_proj": "float"})
    )
    assert kinds(relaxed).count("MatMulInteger") == all_products - 3
    # the two matrices of ff1 are int8, that of encoder_proj is not
    restored = [node.output[0] for node in relaxed.graph.node if node.name.endswith("_restored")]
    products = [node.input[1] for node in relaxed.graph.node if node.op_type == "MatMul"]
    assert len([name for name in products if name in restored]) == 2
    assert len([name for name in products if name in stored(relaxed)]) == 1


def test_weights_in_int8_are_within_half_a_step(folder):
    model = model_of(folder, "las")
    modules = quantise.modules_of(model)
    found = stored(quantise.quantised(model, Treatment(dict.fromkeys(modules, "weights"))))
    checked = 0
    for name, values in stored(model).items():
        if f"{name}_int8" not in found:
            continue
        scale = found[f"{name}_scale"]
        assert found[f"{name}_int8"].dtype == np.int8
        assert np.abs(found[f"{name}_int8"] * scale - values).max() <= 0.501 * scale.max()
        checked += 1
    assert checked >= 6  # embedding, two of the LSTM, and the products


def test_float_treatment_computes_as_before(folder, tmp_path):
    model = model_of(folder, "joiner")
    same = quantise.quantised(model, Treatment({"joiner.output_linear": "float"}))
    x = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    inputs = {"encoder_out": x, "decoder_out": -2 * x}
    expected = load_session(folder.file("joiner", "float")).run(None, inputs)[0]
    onnx_files.save(same, tmp_path / "same.onnx")
    found = load_session(tmp_path / "same.onnx").run(None, inputs)[0]
    assert np.allclose(found, expected, atol=1e-5)


def test_int8_files_are_close_and_in_model_json(folder, parts):
    made = quantise.quantise(folder, parts, good)
    assert made.precisions == ("float", "int8")
    opened = open_folder(folder.path)
    assert opened.info["int8"]["relaxed"] == [] and opened.info["int8"]["candidates"] == 1
    assert opened.rescore == folder.rescore and opened.info["phase"] == folder.info["phase"]
    for part in parts:
        differences = compare(part, opened.file(part.name, "int8"))
        # as coarse as int8 is, and not the float file under another name
        assert 1e-5 < max(d.max_difference for d in differences) < 0.3, part.name
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]


def test_the_module_that_mends_most_is_relaxed_first(small):
    def measure(candidate, only):
        model = onnx.load(str(candidate.file("encoder-streaming", "int8")))
        left = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
        attention = {"encoder.layers.0.attention"}
        is_dynamic = bool(attention & dynamic_modules(model))
        return Loss(0.5 if is_dynamic else 0.0, ("clipped",) if left > 9 else ())

    made = quantise.quantise(*small, measure)
    assert made.info["int8"]["relaxed"] == [{"module": "encoder.layers.0.attention", "how": "weights"}]
    assert made.info["int8"]["wer_difference"] == 0.0
    assert made.info["int8"]["different"] == []


def test_modules_are_tried_on_what_is_wrong_alone_and_the_first_that_is_enough_is_taken(small):
    asked = []

    def measure(candidate, only):
        asked.append(only)
        model = onnx.load(str(candidate.file("encoder-streaming", "int8")))
        is_wrong = "encoder.subsampling" in dynamic_modules(model)
        return Loss(0.0, ("clipped",) if is_wrong else ())

    made = quantise.quantise(*small, measure)
    assert made.info["int8"]["relaxed"] == [{"module": "encoder.subsampling", "how": "weights"}]
    assert asked[0] == () == asked[-1] and set(asked[1:-1]) == {("clipped",)}


def test_what_makes_it_worse_is_not_relaxed(small):
    def measure(candidate, only):
        dynamic = dynamic_modules(onnx.load(str(candidate.file("encoder-streaming", "int8"))))
        wrong = {"encoder.layers.0.ff1", "encoder.layers.0.ff2"} & dynamic
        more = {"conv is exact"} if "encoder.layers.0.conv" not in dynamic else set()
        return Loss(0.0, tuple(sorted(wrong | more)))

    made = quantise.quantise(*small, measure)
    assert made.info["int8"]["different"] == []
    relaxed = {row["module"] for row in made.info["int8"]["relaxed"]}
    assert {"encoder.layers.0.ff1", "encoder.layers.0.ff2"} == relaxed


def test_what_cannot_be_mended_is_told(small):
    made = quantise.quantise(*small, lambda candidate, only: Loss(0.05, ("silence",)))
    assert made.info["int8"]["different"] == ["silence"]
    assert made.info["int8"]["relaxed"] == []  # nothing helped, so nothing is given up for it


def test_a_search_that_is_killed_leaves_the_folder_as_it_was(folder, parts):
    def measure(candidate, only):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise.quantise(folder, parts, measure)
    assert open_folder(folder.path).precisions == ("float",)


def dynamic_modules(model):
    """Modules whose products are integer ones: the bias that is added after a MatMulInteger names them."""
    return {
        name.rsplit(".", 2)[0]
        for node in model.graph.node
        if node.op_type == "Add"
        for value, name in (node.input, node.input[::-1])
        if name.endswith(".bias") and value.endswith("_output_0") and _is_integer(model, value)
    }


def _is_integer(model, value):
    """Whether the value is a MatMulInteger's, after Cast and Mul."""
    makers = {output: node for node in model.graph.node for output in node.output}
    node = makers.get(value)
    while node is not None and node.op_type in ("Mul", "Cast"):
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "MatMulInteger"
