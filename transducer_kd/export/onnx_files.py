"""ONNX files of a model's parts, with the metadata that sherpa-onnx reads.

Every part is traced once and written to a file of its own. compare.py holds the files against PyTorch.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import onnx
import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from transducer_kd.export import graphs
from transducer_kd.log import UserError, atomic_write
from transducer_kd.models.subsampling import LOOKAHEAD_FRAMES, SUBSAMPLING_FACTOR
from transducer_kd.models.transducer import Transducer

_LEAST_SHARED = 64  # bytes of a constant that is worth sharing
OPSET = 17  # the first with LayerNormalization, the last that torch 1.13 writes


@dataclass(frozen=True)
class Part:
    """One ONNX file."""

    name: str  # encoder-streaming, encoder-offline, decoder, joiner or las
    graph: nn.Module
    inputs: Dict[str, Tensor]  # examples to trace with
    outputs: Tuple[str, ...]
    dynamic: Dict[str, Dict[int, str]]  # input or output -> its axes of unknown size
    metadata: Dict[str, str]


def parts_of(model: Transducer, offline_model: Transducer) -> List[Part]:
    """The files of a phase. model: as it streams, or an offline one; offline_model: as it hears whole
    utterances, which is the same but for a model of two modes. Both in eval. UserError for an LSTM
    prediction network.
    """
    encoder = model.encoder.cfg
    if model.config.decoder.kind != "stateless":
        raise UserError(
            f"the phase has a prediction network of kind {model.config.decoder.kind}: sherpa-onnx runs "
            "stateless ones beside a conformer; train with model.decoder.kind=stateless"
        )
    parts = [_streaming_encoder(model)] if encoder.chunk_size else []
    parts.append(_offline_encoder(offline_model))
    context_size, joiner_dim = model.decoder.context_size, model.config.joiner_dim
    parts.append(
        Part(
            "decoder",
            graphs.Decoder(model),
            {"y": torch.tensor([[-1] * (context_size - 1) + [0]] * 2)},
            ("decoder_out",),
            {"y": {0: "N"}, "decoder_out": {0: "N"}},
            {"context_size": str(context_size), "vocab_size": str(model.vocab_size)},
        )
    )
    parts.append(
        Part(
            "joiner",
            graphs.Joiner(model),
            {"encoder_out": _random(2, joiner_dim), "decoder_out": _random(2, joiner_dim)},
            ("logit",),
            {name: {0: "N"} for name in ("encoder_out", "decoder_out", "logit")},
            {"joiner_dim": str(joiner_dim)},
        )
    )
    if model.las is not None:
        parts.append(_las(model))
    return parts


def _streaming_encoder(model: Transducer) -> Part:
    cfg, graph = model.encoder.cfg, graphs.StreamingEncoder(model)
    cache = graph.cache_dim
    window = SUBSAMPLING_FACTOR * cfg.chunk_size + LOOKAHEAD_FRAMES
    outputs = (
        "encoder_out",
        "new_cached_attn",
        "new_cached_conv",
        *(["encoder_frames"] if graph.with_frames else []),
    )
    return Part(
        "encoder-streaming",
        graph,
        {
            "x": _features(1, window, cfg.feature_dim),
            "cached_attn": _random(cfg.num_layers, cfg.left_context, 1, cache),
            "cached_conv": _random(cfg.num_layers, cfg.cnn_module_kernel // 2, 1, cache),
            "processed_lens": torch.tensor([SUBSAMPLING_FACTOR * cfg.chunk_size]),
        },
        outputs,
        {
            **{name: {0: "N"} for name in ("x", "processed_lens", "encoder_out", "encoder_frames")},
            **{
                name: {2: "N"}
                for name in ("cached_attn", "cached_conv", "new_cached_attn", "new_cached_conv")
            },
        },
        {
            "model_type": "conformer",
            "num_encoder_layers": str(cfg.num_layers),
            "T": str(window),
            "decode_chunk_len": str(SUBSAMPLING_FACTOR * cfg.chunk_size),
            "pad_length": str(LOOKAHEAD_FRAMES),
            "left_context": str(cfg.left_context),
            # What sherpa-onnx makes caches of: their width, and one frame more than the convolutions look
            # back.
            "encoder_dim": str(cache),
            "cnn_module_kernel": str(cfg.cnn_module_kernel // 2 + 1),
        },
    )


def _offline_encoder(model: Transducer) -> Part:
    cfg, graph = model.encoder.cfg, graphs.OfflineEncoder(model, model.encoder.cfg.chunk_size)
    outputs = ("encoder_out", "encoder_out_lens", *(["encoder_frames"] if graph.with_frames else []))
    frames = {0: "N", 1: "T_out"}
    return Part(
        "encoder-offline",
        graph,
        {"x": _features(2, 200, cfg.feature_dim), "x_lens": torch.tensor([200, 161])},
        outputs,
        {
            "x": {0: "N", 1: "T"},
            "x_lens": {0: "N"},
            "encoder_out": frames,
            "encoder_out_lens": {0: "N"},
            "encoder_frames": frames,
        },
        {"model_type": "conformer", "chunk_size": str(cfg.chunk_size)},
    )


def _las(model: Transducer) -> Part:
    return Part(
        "las",
        graphs.LasScorer(model.las),
        {
            "encoder_frames": _random(1, 50, model.encoder.encoder_dim),
            "y": torch.randint(3, model.vocab_size, (3, 5), generator=torch.Generator().manual_seed(1)),
            "y_lens": torch.tensor([5, 2, 0]),
        },
        ("score",),
        {
            "encoder_frames": {1: "T_out"},
            "y": {0: "B", 1: "U"},
            "y_lens": {0: "B"},
            "score": {0: "B"},
        },
        {"vocab_size": str(model.vocab_size)},
    )


# ---------------------------------------------------------------- writing


def write_part(part: Part, path: Path) -> None:
    """Trace a part and write it, with its metadata and checked by onnx, atomically.

    A streaming encoder has one unknown size, the number of streams. It is traced with one stream and all
    sizes fixed, and the number is set free afterwards: everything in the graph broadcasts over it (compare()
    runs three streams), while a trace with an unknown size computes all others in every chunk, with more
    operations than the encoder has.
    """
    buffer = io.BytesIO()
    used = (*part.inputs, *part.outputs)
    is_traced_fixed = part.name == "encoder-streaming"
    options: Dict[str, Any] = {"dynamo": False} if "dynamo" in _export_options() else {}
    with torch.no_grad(), _quiet(), _short_reshapes():
        torch.onnx.export(
            part.graph.eval(),
            tuple(part.inputs.values()),
            buffer,
            opset_version=OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes={
                name: axes for name, axes in part.dynamic.items() if name in used and not is_traced_fixed
            },
            **options,
        )
    model = onnx.load_from_string(buffer.getvalue())
    if is_traced_fixed:
        _set_free(model, part.dynamic)
    _share_constants(model)
    add_metadata(model, part.metadata)
    save(model, path)


def _set_free(model: onnx.ModelProto, dynamic: Dict[str, Dict[int, str]]) -> None:
    """Name the axes of inputs and outputs that may have any size, and forget the sizes traced in between."""
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in dynamic[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.value_info[:]


def _share_constants(model: onnx.ModelProto) -> None:
    """Equal constants become one: the trace has the rotary table anew for every layer."""
    first: Dict[bytes, str] = {}
    renamed: Dict[str, str] = {}
    nodes: List[onnx.NodeProto] = []
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        value = (
            node.attribute[0].t if node.op_type == "Constant" and node.attribute[0].HasField("t") else None
        )
        if value is None or value.ByteSize() < _LEAST_SHARED:
            nodes.append(node)
            continue
        known = first.setdefault(value.SerializeToString(), node.output[0])
        renamed[node.output[0]] = known
        if known == node.output[0]:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def shorten_names(model: onnx.ModelProto) -> None:
    """Values between two nodes get short names, nodes none: in a small model names weigh more than biases."""
    fixed = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    short: Dict[str, str] = {"": ""}
    for number, name in enumerate(name for node in model.graph.node for name in node.output):
        short[name] = name if name in fixed else short.get(name, f"v{number}")
    for node in model.graph.node:
        node.name = ""
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]


def save(model: onnx.ModelProto, path: Path) -> None:
    """Check a model and write it, atomically, without the sizes that whoever opens it infers."""
    onnx.checker.check_model(model)
    del model.graph.value_info[:]
    with atomic_write(path, "wb") as f:
        f.write(model.SerializeToString())


def add_metadata(model: onnx.ModelProto, metadata: Dict[str, str]) -> None:
    """Put key and value into an ONNX model, where sherpa-onnx looks for them."""
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value


@contextlib.contextmanager
def _short_reshapes() -> Iterator[None]:
    """unflatten and flatten as one Reshape in which 0 stands for a size that stays: torch 1.13 cannot export
    the one and computes the shape of the other node by node.
    """
    names = {"aten::unflatten": _unflatten, "aten::flatten": _flatten}
    for name, symbolic in names.items():
        torch.onnx.register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in names:
            torch.onnx.unregister_custom_op_symbolic(name, OPSET)


def _unflatten(
    g, x: Any, dim: Any, sizes: Any, names: Any = None
) -> Any:  # torch inspects how g is annotated
    before = symbolic_helper._get_tensor_sizes(x)
    dim, sizes = symbolic_helper._get_const(dim, "i", "dim"), symbolic_helper._maybe_get_const(sizes, "is")
    dim, sizes = dim % len(before), list(sizes)
    after = [*before[:dim], *(None if size < 0 else size for size in sizes), *before[dim + 1 :]]
    return _reshape(g, x, [0] * dim + sizes + [0] * (len(before) - 1 - dim), after)


def _flatten(g, x: Any, start: Any, end: Any) -> Any:
    before = symbolic_helper._get_tensor_sizes(x)
    start, end = (symbolic_helper._get_const(dim, "i", "dim") % len(before) for dim in (start, end))
    assert end == len(before) - 1, "what follows a dimension that is gone cannot be told to stay"
    joined = None if None in before[start:] else math.prod(before[start:])
    return _reshape(g, x, [0] * start + [-1], [*before[:start], joined])


def _reshape(g, x: Any, shape: List[int], sizes: List[Optional[int]]) -> Any:
    """sizes: of the result, as far as they are known: without them later operations ask for them as they
    run.
    """
    if -1 not in shape and 0 in shape:  # torch 1.13 infers no shape with a 0 and no -1
        shape[len(shape) - 1 - shape[::-1].index(0)] = -1
    y = g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape, dtype=torch.int64)))
    y.setType(x.type().with_sizes(sizes))
    return y


def _export_options() -> Sequence[str]:
    code = torch.onnx.export.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's warnings: sizes that become constants are those meant to, and compare() would
    show it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _features(num: int, num_frames: int, num_bins: int) -> Tensor:
    """(num, num_frames, num_bins) of the scale of log-mel energies."""
    return 3 * _random(num, num_frames, num_bins) - 8
