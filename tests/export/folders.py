"""Copies of exported folders in which something is different."""

import json
import shutil

import onnx

from transducer_kd.export.folder import describe


def changed(source, target, part, change):
    """A copy of the folder `source`, described anew after `change` was made to the ONNX model of a part."""
    shutil.copytree(source, target)
    model = onnx.load(str(target / f"{part}.onnx"))
    change(model)
    onnx.save(model, str(target / f"{part}.onnx"))
    return described_anew(target)


def described_anew(target, more_files=()):
    """The folder, whose model.json names the files that it named, as they are now, and some more."""
    info = json.loads((target / "model.json").read_text())
    about = {key: value for key, value in info.items() if key not in ("format", "files")}
    return describe(target, about, [*info["files"], *more_files])


def without_metadata(source, target, part, key):
    """A folder in which a part lacks a key of its metadata."""

    def drop(model):
        kept = [p for p in model.metadata_props if p.key != key]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)

    return changed(source, target, part, drop)


def without_words(source, target):
    """A folder whose joiner says blank to everything."""

    def silence(model):
        bias = next(i for i in model.graph.initializer if i.name.endswith("output_linear.bias"))
        values = onnx.numpy_helper.to_array(bias).copy()
        values[0] = 1e4
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))

    return changed(source, target, "joiner", silence)


def with_int8(source, target):
    """A folder in which every part is there as int8 too: the float file under another name."""
    shutil.copytree(source, target)
    parts = [path for path in target.glob("*.onnx") if ".int8." not in path.name]
    for path in parts:
        shutil.copy(path, path.with_suffix(".int8.onnx"))
    return described_anew(target, [path.with_suffix(".int8.onnx").name for path in parts])
