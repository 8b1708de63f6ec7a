"""int8 files of a model folder, and the search for what has to stay more exact.

Matrix products with a weight are dynamic int8 (onnxruntime's): the weight per column, the activations as
they come, and the product in integers. All other large weights (convolutions, embeddings, the LSTM's) are
stored in int8 and become float again when the file is opened, which makes the file as small and computes as
before.

Where that loses too much on dev speech, modules are relaxed one by one: first their products have only the
weights in int8, which costs no byte, then they stay float. The order is that of what relaxing a module by
itself mends.
"""

import contextlib
import itertools
import logging
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from transducer_kd.export.folder import SCRATCH, ModelFolder, describe, file_name
from transducer_kd.export.onnx_files import Part, save, shorten_names
from transducer_kd.log import progress

# How a module's matrix products are computed, exact last.
LEVELS = ("dynamic", "weights", "float")
MOST_WORSE = 0.2  # per cent WER on dev speech; the gate allows more on test sets
_FLOAT_SHARE = 4  # of so many modules one may stay float
_NOTHING = (0, 0.0)
_LEAST_VALUES = 256  # of a weight that is worth storing in int8
_MODULE = re.compile(
    r"(?:encoder|las)\.layers\.\d+\.(?:ff1|attention|conv|ff2)|encoder\.subsampling|las\.lstm"
)
_OUT_AXIS = {"MatMul": 1, "Conv": 0, "Gather": 0, "LSTM": 1}  # of a weight, which has a scale for each entry


@dataclass
class Treatment:
    """How exact each module is kept; "dynamic" where nothing is said."""

    levels: Dict[str, str] = field(default_factory=dict)

    def of(self, module: str) -> str:
        return self.levels.get(module, LEVELS[0])

    def relaxed(self, module: str, level: str) -> "Treatment":
        return Treatment({**self.levels, module: level})

    def rows(self) -> List[Dict[str, str]]:
        """For model.json."""
        return [{"module": module, "how": level} for module, level in self.levels.items()]


def quantise(
    folder: ModelFolder, parts: Sequence[Part], measure: Callable[[ModelFolder, Sequence[str]], Any]
) -> ModelFolder:
    """Make the int8 files of a folder, and name them in its model.json when they are final.

    parts: what the folder was written from. measure: the loss of a folder's int8 files on dev speech, with
    `wer_difference` (per cent) and `different` (odd inputs that are understood differently); its second
    argument names the only odd inputs to try, without a WER, and nothing where all are wanted.
    """
    names = [part.name for part in parts]
    models = {name: _products_alone(onnx.load(str(folder.file(name, "float")))) for name in names}
    with tempfile.TemporaryDirectory(dir=folder.path, prefix=SCRATCH) as temporary:
        candidates = _Candidates(folder, models, Path(temporary), measure)
        treatment = _search(candidates, sorted(set(itertools.chain(*map(modules_of, models.values())))))
        found, loss = candidates.make(treatment), candidates.loss(treatment)
        for name in names:
            final = onnx.load(str(found.file(name, "int8")))
            shorten_names(final)
            save(final, folder.path / file_name(name, "int8"))
    about = {key: value for key, value in folder.info.items() if key not in ("format", "files")}
    about["int8"] = {
        "relaxed": treatment.rows(),
        "wer_difference": loss.wer_difference,
        "different": list(loss.different),
        "candidates": candidates.measured,
    }
    return describe(folder.path, about, [*folder.info["files"], *(file_name(name, "int8") for name in names)])


class _Candidates:
    """int8 files of other treatments, in a folder beside the model's, and what they lose."""

    def __init__(
        self,
        folder: ModelFolder,
        models: Dict[str, onnx.ModelProto],
        temporary: Path,
        measure: Callable[[ModelFolder, Sequence[str]], Any],
    ):
        self.folder, self.models, self.temporary, self.measure = folder, models, temporary, measure
        self.measured = 0
        self._losses: Dict[str, Any] = {}
        self._made: Dict[str, List[str]] = {}  # of each part the levels that its file has now
        for name in folder.info["files"]:
            (temporary / name).symlink_to((folder.path / name).resolve())

    def make(self, treatment: Treatment) -> ModelFolder:
        """A folder with these int8 files. The one that was made before has them, too."""
        files = dict(self.folder.info["files"])
        for name, model in self.models.items():
            path = self.temporary / file_name(name, "int8")
            levels = [treatment.of(module) for module in modules_of(model)]
            if self._made.get(name) != levels:
                save(quantised(model, treatment), path)
                self._made[name] = levels
            files[path.name] = {"bytes": path.stat().st_size, "sha256": ""}
        return ModelFolder(self.temporary, {**self.folder.info, "files": files})

    def loss(self, treatment: Treatment, only: Sequence[str] = ()) -> Any:
        """only: the odd inputs to try, without a WER; nothing: all that there is to measure."""
        key = f"{sorted(treatment.levels.items())} {only}"
        if key not in self._losses:
            self._losses[key] = self.measure(self.make(treatment), only)
            self.measured += 1
        return self._losses[key]

    def badness(self, treatment: Treatment, only: Sequence[str] = ()) -> Tuple[int, float]:
        """0, 0 where nothing is wrong; odd inputs count first."""
        loss = self.loss(treatment, only)
        return len(loss.different), max(0.0, loss.wer_difference - MOST_WORSE)


def _search(candidates: _Candidates, modules: List[str]) -> Treatment:
    """The first treatment that loses nothing, or the one that loses least."""
    treatment = best = Treatment()
    least = candidates.badness(best)
    logging.info("int8: all products dynamic: %s", _told(candidates.loss(best)))
    for level in LEVELS[1:]:
        if least == _NOTHING:
            break
        # Where the WER is good enough, what a module mends shows in the odd inputs that are not, in seconds.
        loss = candidates.loss(treatment)
        only = loss.different if loss.wer_difference <= MOST_WORSE else ()
        alone = {}
        for module in progress(modules, total=len(modules), desc=f"int8: one module with {level}"):
            relaxed = treatment.relaxed(module, level)
            alone[module] = candidates.badness(relaxed, only)
            if alone[module] == _NOTHING and candidates.badness(relaxed) == _NOTHING:
                logging.info("int8: %s with %s is enough", module, level)
                return relaxed
        order = sorted(modules, key=lambda m: alone[m])
        # An int8 file that is float for the most part is none.
        for module in order if level != "float" else order[: len(order) // _FLOAT_SHARE]:
            relaxed = treatment.relaxed(module, level)
            found = candidates.badness(relaxed)
            logging.info("int8: %s with %s as well: %s", module, level, _told(candidates.loss(relaxed)))
            if found > least:  # two roundings had made up for each other
                continue
            treatment = relaxed
            if found < least:
                best, least = treatment, found
            if least == _NOTHING:
                break
    return best


def _told(loss: Any) -> str:
    different = f"; other words for {', '.join(loss.different)}" if loss.different else ""
    return f"WER {loss.wer_difference:+.2f} on dev{different}"


# ---------------------------------------------------------------- one file


def modules_of(model: onnx.ModelProto) -> List[str]:
    """Modules that have matrix products with a weight, in order."""
    weights = {weight.name for weight in model.graph.initializer}
    found = [
        module
        for node, module in _with_modules(model)
        if node.op_type == "MatMul" and node.input[1] in weights
    ]
    return list(dict.fromkeys(found))


def quantised(model: onnx.ModelProto, treatment: Treatment) -> onnx.ModelProto:
    """The int8 model of a float one (see _products_alone), which is left as it is."""
    modules = {node.name: module for node, module in _with_modules(model)}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    dynamic = [name for name in products if treatment.of(modules[name]) == "dynamic"]
    if dynamic:
        with tempfile.TemporaryDirectory() as temporary, _unwarned():
            path = Path(temporary, "int8.onnx")
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=dynamic,
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
            result = onnx.load(str(path))
    else:
        result = onnx.ModelProto()
        result.CopyFrom(model)
    kept_float = set()
    for node, module in _with_modules(model):
        if treatment.of(module) == "float":
            kept_float.update(node.input)
    _store_as_int8(result, kept_float)
    return result


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """onnxruntime advises to preprocess every model, which is for static quantisation."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _store_as_int8(model: onnx.ModelProto, kept_float: set) -> None:
    """Large float weights become int8 and a scale for each output. Cast and Mul make them float again, which
    onnxruntime computes once, when it opens the file (a DequantizeLinear it would compute in every run).
    """
    axis_of = {
        weight: _OUT_AXIS[node.op_type]
        for node in model.graph.node
        if node.op_type in _OUT_AXIS
        for weight in (node.input[:1] if node.op_type == "Gather" else node.input[1:3])
    }
    restored: List[onnx.NodeProto] = []
    for weight in list(model.graph.initializer):
        values = numpy_helper.to_array(weight)
        is_large = values.dtype == np.float32 and values.size >= _LEAST_VALUES and values.ndim > 1
        if not is_large or weight.name in kept_float or weight.name not in axis_of:
            continue
        others = tuple(i for i in range(values.ndim) if i != axis_of[weight.name])
        scale = np.abs(values).max(axis=others, keepdims=True) / 127
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        rounded = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
        model.graph.initializer.remove(weight)
        stored = [(f"{weight.name}_int8", rounded), (f"{weight.name}_scale", scale)]
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored)
        cast = f"{weight.name}_cast"
        restored += [
            helper.make_node("Cast", [stored[0][0]], [cast], name=cast, to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [cast, stored[1][0]], [weight.name], name=f"{weight.name}_restored"),
        ]
    nodes = [*restored, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _products_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with each Gemm written as MatMul and Add, so that all matrix products are of one kind."""
    weights = {weight.name: weight for weight in model.graph.initializer}
    nodes: List[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if options.get("transB"):
            values = numpy_helper.to_array(weights[node.input[1]]).T.copy()
            weights[node.input[1]].CopyFrom(numpy_helper.from_array(values, node.input[1]))
        product = f"{node.output[0]}_product"
        nodes.append(helper.make_node("MatMul", node.input[:2], [product], name=f"{node.name}_MatMul"))
        nodes.append(helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_Add"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _with_modules(model: onnx.ModelProto) -> Iterator[Tuple[onnx.NodeProto, str]]:
    """Nodes that have a weight, and the module that it belongs to: that of the bias which is added, or of
    the weight.
    """
    added = {
        value: other
        for node in model.graph.node
        if node.op_type == "Add"
        for value, other in (node.input, node.input[::-1])
        if other.endswith(".bias")
    }
    for node in model.graph.node:
        if node.op_type == "MatMul":
            name = added.get(node.output[0], "")
        elif node.op_type == "LSTM":
            name = "las.lstm"
        elif node.op_type in _OUT_AXIS:
            name = next((value for value in reversed(node.input) if value.endswith((".bias", ".weight"))), "")
        else:
            continue
        found = _MODULE.search(name)
        yield node, found.group() if found else name.rsplit(".", 1)[0]
