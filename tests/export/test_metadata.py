"""Metadata is read as onnx reads it, and damage is an error."""

import onnx
import pytest

from transducer_kd.export.metadata import NEEDED, check_metadata, read_metadata
from transducer_kd.log import UserError


def test_equals_what_onnx_reads(las_folder):
    paths = sorted(las_folder.glob("*.onnx"))
    assert len(paths) >= 5
    for path in paths:
        found = read_metadata(path)
        assert found == {p.key: p.value for p in onnx.load(str(path)).metadata_props} != {}
        check_metadata(path, path.stem)
    assert set(NEEDED["encoder-streaming"]) <= read_metadata(las_folder / "encoder-streaming.onnx").keys()


def test_long_and_empty_values_and_no_metadata(tmp_path):
    path, model = tmp_path / "decoder.onnx", onnx.ModelProto(ir_version=300)
    path.write_bytes(model.SerializeToString())
    assert read_metadata(path) == {}
    for key, value in (("vocab_size", "9" * 1000), ("context_size", "")):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    assert read_metadata(path) == {"vocab_size": "9" * 1000, "context_size": ""}
    with pytest.raises(UserError, match="has no metadata context_size, without"):
        check_metadata(path, "decoder")
    check_metadata(path, "joiner")
    model.metadata_props[1].value = "two"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="metadata context_size is 'two', and no whole number"):
        check_metadata(path, "decoder")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-3],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\xff",
        lambda content: b"this is no model" + content,
        lambda content: b"\xff" * 50,
    ],
)
def test_damage_is_an_error_that_names_the_file(streaming_folder, tmp_path, damage):
    path = tmp_path / "encoder.onnx"
    path.write_bytes(damage((streaming_folder / "encoder-streaming.onnx").read_bytes()))
    with pytest.raises(UserError, match="encoder.onnx (is no ONNX file|has no metadata).*local/export.py"):
        check_metadata(path, "encoder-streaming")
