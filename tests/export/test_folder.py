"""A model folder is described, and checked before anything is run from it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.data.test_features import speechlike
from tests.export.folders import with_int8
from transducer_kd.export.folder import PARTS, file_name, open_folder
from transducer_kd.export.sherpa import SherpaStreaming
from transducer_kd.log import UserError

ABOUT = {"phase": "small", "checkpoint": "epoch-1"}


@pytest.fixture
def copy(las_folder, tmp_path):
    return shutil.copytree(las_folder, tmp_path / "model")


def edited(folder, **changes):
    info = json.loads((folder / "model.json").read_text())
    info.update(changes)
    (folder / "model.json").write_text(json.dumps(info))


def test_what_a_folder_offers(streaming_folder, offline_folder, las_folder):
    streaming, offline, las = (open_folder(p) for p in (streaming_folder, offline_folder, las_folder))
    assert streaming.modes == las.modes == ("streaming", "offline") and offline.modes == ("offline",)
    assert las.has_las and las.rescore["mu"] == 0.6
    assert not streaming.has_las and streaming.rescore is None
    assert streaming.precisions == ("float",)
    files = ["encoder-streaming.onnx", "decoder.onnx", "joiner.onnx"]
    expected = sum((streaming_folder / name).stat().st_size for name in files)
    assert streaming.bytes("streaming", "float") == expected
    las_bytes = (las_folder / "las.onnx").stat().st_size
    assert las.bytes("offline", "float", with_las=True) == las.bytes("offline", "float") + las_bytes
    with pytest.raises(UserError, match=r"no decoder\.int8\.onnx; it has decoder\.onnx"):
        streaming.file("decoder", "int8")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: shutil.rmtree(f), "there is no model folder .*model; local/export.py makes one"),
        (lambda f: (f / "model.json").unlink(), "no model.json"),
        (
            lambda f: (f / "model.json").write_text("{"),
            "model.json is not valid JSON.*export the phase again",
        ),
        (lambda f: (f / "model.json").write_text("[]"), "does not describe a model"),
        (lambda f: edited(f, format=2), "has format 2, and this program reads 1"),
        (lambda f: edited(f, files={}), "model has no decoder.onnx"),
        (lambda f: [path.unlink() for path in f.glob("encoder-*")], "model has no encoder;"),
        (lambda f: edited(f, chunk_size="x"), "chunk_size is 'x', and a whole number belongs there"),
        (lambda f: edited(f, rescore={"mu": 0.5}), r"has no rescore\.beam_size"),
        (lambda f: edited(f, rescore=[]), r"has no rescore\.beam_size"),
        (lambda f: (f / "joiner.onnx").unlink(), r"joiner\.onnx is missing, but model\.json names it"),
        (lambda f: (f / "las.onnx").write_bytes(b"half"), r"las\.onnx is not the file that was exported"),
        (lambda f: edited(f, files={"decoder.onnx": 1}), "does not say how large decoder.onnx is"),
    ],
)
def test_what_is_wrong_is_named(copy, change, message):
    change(copy)
    with pytest.raises(UserError, match=message):
        open_folder(copy)


@pytest.mark.parametrize("kept, gone", [("int8", "float"), ("float", "int8")])
def test_a_copy_of_one_precision_and_of_what_is_run(las_folder, tmp_path, kept, gone):
    folder = with_int8(las_folder, tmp_path / "model")
    for name in ("bpe.model", "model.safetensors", *(file_name(part, gone) for part in PARTS)):
        (folder.path / name).unlink()
    copy = open_folder(folder.path)
    assert copy.precisions == (kept,) and copy.modes == ("streaming", "offline") and copy.has_las
    with pytest.raises(UserError, match="has no joiner"):
        copy.file("joiner", gone)
    said = SherpaStreaming(open_folder(las_folder)).decode(speechlike(16000))
    assert SherpaStreaming(copy, kept).decode(speechlike(16000)) == said != ""
    for part in ("las", "encoder-offline"):
        (folder.path / file_name(part, kept)).unlink()
    copy = open_folder(folder.path)
    assert copy.precisions == (kept,) and copy.modes == ("streaming",) and not copy.has_las
    assert SherpaStreaming(copy, kept).decode(speechlike(16000)) == said
    (folder.path / file_name("joiner", kept)).unlink()
    with pytest.raises(UserError, match=r"joiner.*onnx is missing, but model\.json names it"):
        open_folder(folder.path)


def test_of_a_part_that_is_left_out_no_file_may_stay(las_folder, tmp_path):
    folder = with_int8(las_folder, tmp_path / "model")
    (folder.path / "encoder-offline.int8.onnx").unlink()
    with pytest.raises(UserError, match=r"encoder-offline\.int8\.onnx is missing, but model\.json names it"):
        open_folder(folder.path)


def test_a_changed_byte_is_found(copy):
    path = copy / "tokens.txt"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"tokens\.txt is not the file that was exported"):
        open_folder(copy)


def test_weights_and_tokens_come_with_it(las_folder, las_model, lang_dir):
    weights = load_file(str(las_folder / "model.safetensors"))
    state = las_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    assert sum(v.numel() for v in weights.values()) == las_model.deployed_parameters()
    for name in ("tokens.txt", "bpe.model"):
        assert (las_folder / name).read_bytes() == (lang_dir / name).read_bytes()
    info = open_folder(las_folder).info
    assert info["params_deployed"] == las_model.deployed_parameters()
    assert info["params_first_pass"] == las_model.first_pass_parameters()
