"""ONNX files hold what the PyTorch parts compute, and what sherpa-onnx asks of them."""

import copy

import numpy as np
import onnx
import pytest
import torch

from tests.export.conftest import tiny_model
from transducer_kd.export import graphs, onnx_files
from transducer_kd.export.compare import MAX_DIFFERENCE, compare
from transducer_kd.log import UserError
from transducer_kd.models.attention import RotaryTable


def parts(model, offline_model=None):
    return {part.name: part for part in onnx_files.parts_of(model, offline_model or model)}


def written(part, tmp_path):
    path = tmp_path / f"{part.name}.onnx"
    onnx_files.write_part(part, path)
    return path


@pytest.mark.parametrize("name", ["encoder-streaming", "encoder-offline", "decoder", "joiner", "las"])
def test_every_output_is_that_of_pytorch(name, las_model, tmp_path):
    part = parts(las_model)[name]
    differences = compare(part, written(part, tmp_path))
    assert [d.output for d in differences] == list(part.outputs)
    assert all(d.max_difference < 1e-5 and d.starts_at is None for d in differences)


@pytest.mark.parametrize("left_context, chunk_size", [(8, 1), (3, 4), (0, 2)])
def test_a_streaming_encoder_of_any_chunk(left_context, chunk_size, tmp_path):
    part = parts(tiny_model(40, chunk_size, left_context=left_context))["encoder-streaming"]
    assert all(d.max_difference < 1e-5 for d in compare(part, written(part, tmp_path)))


def test_fewer_heads_leave_caches_as_wide_as_the_encoder(tmp_path):
    model = tiny_model(40, num_heads=1, head_dim=4)
    part = parts(model)["encoder-streaming"]
    assert graphs.cache_dim(model.encoder) == 16 == part.inputs["cached_attn"].size(3)
    assert all(d.max_difference < 1e-5 for d in compare(part, written(part, tmp_path)))


def test_metadata_is_what_sherpa_onnx_makes_its_caches_of(streaming_model, tmp_path):
    path = written(parts(streaming_model)["encoder-streaming"], tmp_path)
    found = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    assert found == {
        "model_type": "conformer", "num_encoder_layers": "2", "T": "19", "decode_chunk_len": "16",
        "pad_length": "3", "left_context": "8", "encoder_dim": "32", "cnn_module_kernel": "4",
    }  # fmt: skip


def test_a_file_holds_the_weights_once_and_no_table(las_model, tmp_path):
    for part in parts(las_model).values():
        weights = sum(p.numel() for p in part.graph.parameters()) * 4
        assert written(part, tmp_path).stat().st_size < weights + 120_000, part.name


def test_equal_constants_are_in_a_file_once(streaming_model, tmp_path):
    model = onnx.load(str(written(parts(streaming_model)["encoder-streaming"], tmp_path)))
    constants = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    large = [value.SerializeToString() for value in constants if value.ByteSize() >= 64]
    assert large and len(large) == len(set(large))
    assert not model.graph.value_info


def test_short_names_change_no_value(las_model, tmp_path):
    for part in parts(las_model).values():
        path = written(part, tmp_path)
        model = onnx.load(str(path))
        onnx_files.shorten_names(model)
        onnx_files.save(model, tmp_path / "short.onnx")
        assert (tmp_path / "short.onnx").stat().st_size < path.stat().st_size
        assert all(d.max_difference < 1e-5 for d in compare(part, tmp_path / "short.onnx"))


def test_a_wrong_layer_is_named(streaming_model, tmp_path):
    for name in ("encoder-streaming", "encoder-offline"):
        part = parts(streaming_model)[name]
        path = written(part, tmp_path)
        model = onnx.load(str(path))
        wrong = next(i for i in model.graph.initializer if i.name == "encoder.layers.1.ff1_norm.weight")
        values = onnx.numpy_helper.to_array(wrong) * 1.5
        wrong.CopyFrom(onnx.numpy_helper.from_array(values, wrong.name))
        onnx_files.save(model, path)
        differences = compare(part, path)
        assert max(d.max_difference for d in differences) > MAX_DIFFERENCE
        assert {d.starts_at for d in differences} == {"encoder.layers.1"}


def test_a_layer_that_is_wrong_from_the_second_chunk_on_is_named(streaming_model, tmp_path):
    part = parts(streaming_model)["encoder-streaming"]
    path = written(part, tmp_path)
    scale_cache(path, "cached_conv", 0.0)
    assert {d.starts_at for d in compare(part, path)} == {"encoder.layers.0"}


def test_what_a_cache_loses_in_each_chunk_adds_up(tmp_path):
    """A frame is in the cache of attention for four chunks, so that it is passed on three times."""
    part = parts(tiny_model(40, left_context=16))["encoder-streaming"]
    path = written(part, tmp_path)
    scale_cache(path, "cached_attn", 1.0005)
    found = {d.output: d.max_difference for d in compare(part, path)}
    assert (
        found["new_cached_attn"] == pytest.approx(1.0005**3 - 1, rel=0.01) and 1.0005**3 - 1 > MAX_DIFFERENCE
    )


def scale_cache(path, cache, factor):
    """Makes the streaming encoder at `path` hear other caches than it is given."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == cache:
                node.input[i] = "scaled"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(1, factor, np.float32), "factor"))
    model.graph.node.insert(0, onnx.helper.make_node("Mul", [cache, "factor"], ["scaled"]))
    onnx_files.save(model, path)


def test_what_is_no_number_is_no_agreement(streaming_model, tmp_path):
    part = parts(streaming_model)["joiner"]
    path = written(part, tmp_path)
    part = parts(copy.deepcopy(streaming_model))["joiner"]
    with torch.no_grad():
        part.graph.joiner.output_linear.bias[3] = float("nan")
    (difference,) = compare(part, path)
    assert difference.max_difference == float("inf")


def test_a_length_without_end_is_rotated_as_the_table_does():
    table, computed = RotaryTable(8), graphs.AnyLengthRotaryTable(RotaryTable(8))
    cpu = torch.device("cpu")
    assert torch.allclose(table(9000, cpu), computed(9000, cpu), atol=1e-6)


def test_no_lstm_decoder():
    model = tiny_model(40)
    model.config.decoder.kind = "lstm"
    with pytest.raises(UserError, match="kind lstm.*decoder.kind=stateless"):
        onnx_files.parts_of(model, model)
