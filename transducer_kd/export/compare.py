"""ONNX files held against PyTorch.

`compare` runs a part in onnxruntime and in PyTorch on the same inputs, chunk after chunk where it streams,
and says how far each output is off and where in the encoder that begins.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import numpy as np
import onnx
import torch
from torch import Tensor

from transducer_kd.export.onnx_files import Part
from transducer_kd.export.session import load_session
from transducer_kd.models.conformer import Conformer

_CACHES = ("cached_attn", "cached_conv")  # inputs; the second and third output are the next chunk's
MAX_DIFFERENCE = 1e-3  # of a float32 output, as a share of the largest of PyTorch's where that is above 1


@dataclass(frozen=True)
class Difference:
    """How far an output of an ONNX file is from PyTorch's."""

    part: str
    output: str
    max_difference: float  # relative to the largest value where that is above 1
    limit: float
    starts_at: Optional[str] = None  # the first layer whose own output is beyond the limit


def compare(part: Part, path: Path, limit: float = MAX_DIFFERENCE) -> List[Difference]:
    """Each output of the file at `path` against that of its graph in PyTorch, on inputs that differ from
    those it was traced with. A streaming encoder runs five chunks, the file and PyTorch each with the caches
    that it has made itself, so that what differs adds up as on a device; the offline one runs a batch of
    unequal lengths.
    """
    session, largest = load_session(path), dict.fromkeys(part.outputs, 0.0)
    file_caches: Dict[str, Tensor] = {}
    torch_caches: Dict[str, Tensor] = {}
    starts_at = None
    for inputs in _other_inputs(part):
        to_file, to_torch = {**inputs, **file_caches}, {**inputs, **torch_caches}
        with torch.inference_mode():
            expected = part.graph.eval()(*to_torch.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = [torch.from_numpy(y) for y in session.run(None, _arrays(to_file))]
        for name, y, wanted in zip(part.outputs, found, expected):
            largest[name] = max(largest[name], difference(y, wanted, _valid_lens(part, expected)))
        if part.name.startswith("encoder") and starts_at is None and max(largest.values()) > limit:
            starts_at = _first_layer_off(part, path, limit, to_file, to_torch)
        if part.name == "encoder-streaming":
            file_caches, torch_caches = (dict(zip(_CACHES, made[1:3])) for made in (found, expected))
    return [Difference(part.name, name, value, limit, starts_at) for name, value in largest.items()]


def _valid_lens(part: Part, outputs: Sequence[Tensor]) -> Optional[Tensor]:
    """(N,) frames of each utterance that mean something; None where all do."""
    return outputs[1] if part.name == "encoder-offline" else None


def difference(found: Tensor, wanted: Tensor, lens: Optional[Tensor] = None) -> float:
    """Largest difference of two outputs, as a share of the largest value where that is above 1; inf for
    another shape or a value that is not finite. lens: (N,) frames of (N,T',D) that mean something.
    """
    if found.shape != wanted.shape or not bool(torch.isfinite(found.double() - wanted.double()).all()):
        return float("inf")
    if lens is not None and found.dim() == 3:
        valid = torch.arange(found.size(1)) < lens.unsqueeze(1)
        found, wanted = found[valid], wanted[valid]
    if not found.numel():
        return 0.0
    scale = wanted.double().abs().max().clamp(min=1)
    return float((found.double() - wanted.double()).abs().max() / scale)


def _arrays(inputs: Dict[str, Tensor]) -> Dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


@contextmanager
def layer_outputs(encoder: Conformer) -> Iterator[Dict[str, List[Tensor]]]:
    """{subsampling or layer: (N,T',D) that it gives, of every call of the encoder in this context}: what the
    first norm of the next layer is given.
    """
    norms = [*(layer.ff1_norm for layer in encoder.layers), encoder.norm]
    makers = ["encoder.subsampling", *(f"encoder.layers.{i}" for i in range(len(encoder.layers)))]
    given: Dict[str, List[Tensor]] = {maker: [] for maker in makers}
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
        for norm, kept in zip(norms, given.values())
    ]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _other_inputs(part: Part) -> Iterator[Dict[str, Tensor]]:
    """Inputs of other sizes and values than the part was traced with, in the order in which it takes them."""
    seed = torch.Generator().manual_seed(7)
    if part.name == "encoder-streaming":
        x, attn, conv, lens = part.inputs.values()
        num_streams, step = 3, int(part.metadata["decode_chunk_len"])
        for number in range(5):
            yield {
                "x": 3 * torch.randn(num_streams, *x.shape[1:], generator=seed) - 8,
                "cached_attn": attn.new_zeros(attn.size(0), attn.size(1), num_streams, attn.size(3)),
                "cached_conv": conv.new_zeros(conv.size(0), conv.size(1), num_streams, conv.size(3)),
                "processed_lens": torch.full((num_streams,), number * step),
            }
    elif part.name == "encoder-offline":
        for lens in ([7], [333, 90, 7]):
            x = 3 * torch.randn(len(lens), max(lens), part.inputs["x"].size(2), generator=seed) - 8
            yield {"x": x, "x_lens": torch.tensor(lens)}
    elif part.name == "decoder":
        vocab_size, context = int(part.metadata["vocab_size"]), part.inputs["y"].size(1)
        yield {"y": torch.randint(-1, vocab_size, (7, context), generator=seed)}
    elif part.name == "joiner":
        yield {name: torch.randn(5, value.size(1), generator=seed) for name, value in part.inputs.items()}
    else:
        frames, vocab_size = part.inputs["encoder_frames"], int(part.metadata["vocab_size"])
        for num_hyps, num_tokens, num_frames in ((1, 1, 3), (6, 9, 77)):
            lens = torch.randint(0, num_tokens + 1, (num_hyps,), generator=seed)
            yield {
                "encoder_frames": torch.randn(1, num_frames, frames.size(2), generator=seed),
                "y": torch.randint(3, vocab_size, (num_hyps, num_tokens), generator=seed),
                "y_lens": lens,
            }


def _first_layer_off(
    part: Part, path: Path, limit: float, to_file: Dict[str, Tensor], to_torch: Dict[str, Tensor]
) -> str:
    """The first of subsampling, layers and norm whose output for these inputs is beyond the limit. In the
    file, too, a layer's output is what the first norm of the next one is given.

    to_file and to_torch differ in the caches alone.
    """
    encoder = part.graph.encoder
    with torch.inference_mode(), layer_outputs(encoder) as expected:
        lens = _valid_lens(part, part.graph(*to_torch.values()))

    model = onnx.load(str(path))
    given_to = {
        node.input[1]: node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"
    }
    norms = [*(f"encoder.layers.{i}.ff1_norm" for i in range(len(encoder.layers))), "encoder.norm"]
    values = [given_to[f"{name}.weight"] for name in norms]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(value) for value in values)
    session = load_session(path, content=model.SerializeToString())
    found = session.run(values, _arrays(to_file))
    for (maker, (wanted,)), y in zip(expected.items(), found):
        if difference(torch.from_numpy(y), wanted, lens) > limit:
            return maker
    return "encoder.norm"
