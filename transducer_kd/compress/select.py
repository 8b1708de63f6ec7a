"""First weights of a smaller student, taken from its teacher: layers, attention heads, feed-forward units.

Everything here maps state dicts to state dicts. The residual width stays what it is, so that what is kept
fits together as it did; decoder, joiner and the heads that only training uses are copied.

    layers   evenly spaced over the teacher's, the first and the last among them
    heads    those of a kept layer that write most: norm of their values' times norm of their output weights
    units    those of a kept feed-forward module with the largest norm of what they read by, times that of
             what they write by

A head or unit that is left out takes its part of a sum with it, nothing else: with all of them kept the
result is the teacher. Choosing by magnitude is the common baseline (Han et al. 2015, arXiv:1506.02626; for
heads Michel et al. 2019, arXiv:1905.10650, rank by a gradient instead).

Shapes: D encoder_dim, H heads, E channels of a head, F feedforward_dim.
"""

import re
from dataclasses import dataclass
from typing import Dict, List

import torch
from torch import Tensor

from transducer_kd.config import EncoderConfig, ModelConfig
from transducer_kd.log import UserError

State = Dict[str, Tensor]
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_SAME = (
    "feature_dim", "subsampling_channels", "encoder_dim", "cnn_module_kernel", "chunk_size", "left_context",
)  # fmt: skip


@dataclass(frozen=True)
class LayerSelection:
    """What one layer of the student is made of; numbers are the teacher's, ascending."""

    layer: int
    heads: List[int]
    ff1: List[int]
    ff2: List[int]


def evenly_spaced(kept: int, of: int) -> List[int]:
    """`kept` of the numbers 0 .. of-1, the ends among them where there are two or more."""
    if kept == 1:
        return [of - 1]
    return [round(i * (of - 1) / (kept - 1)) for i in range(kept)]


def choose(state: State, teacher: ModelConfig, student: ModelConfig) -> List[LayerSelection]:
    """What the student's layers keep of the teacher's. UserError where the student is no part of it."""
    check_fits(teacher, student)
    selections = []
    for layer in evenly_spaced(student.encoder.num_layers, teacher.encoder.num_layers):
        prefix = f"encoder.layers.{layer}."
        heads = _head_norms(state, prefix, teacher.encoder)
        units = [_unit_norms(state, f"{prefix}{name}.") for name in ("ff1", "ff2")]
        width = student.encoder.feedforward_dim
        selections.append(
            LayerSelection(
                layer,
                _largest(heads, student.encoder.num_heads),
                *(_largest(norms, width) for norms in units),
            )
        )
    return selections


def check_fits(teacher: ModelConfig, student: ModelConfig) -> None:
    """UserError, naming the setting, where the student cannot be cut out of the teacher."""
    large, small = teacher.encoder, student.encoder
    pairs = {f"encoder.{name}": (getattr(large, name), getattr(small, name)) for name in _SAME}
    pairs["encoder.head_dim"] = large.channels_per_head, small.channels_per_head
    for name in ("kind", "decoder_dim", "context_size", "num_layers"):
        pairs[f"decoder.{name}"] = getattr(teacher.decoder, name), getattr(student.decoder, name)
    pairs["joiner_dim"] = teacher.joiner_dim, student.joiner_dim
    for name, (there, here) in pairs.items():
        if there != here:
            raise UserError(
                f"model.{name} is {there} in the teacher and {here} in the student: layers, heads and "
                "feed-forward units can be selected, the rest has to be the same"
            )
    for name in ("num_layers", "num_heads", "feedforward_dim"):
        if getattr(small, name) > getattr(large, name):
            raise UserError(
                f"model.encoder.{name} is {getattr(small, name)} in the student and only "
                f"{getattr(large, name)} in the teacher: a student is selected from a larger model"
            )


def apply(state: State, selections: List[LayerSelection], teacher: ModelConfig) -> State:
    """The student's state dict: copies of the selected weights of `state`, and of all that is no layer."""
    encoder = teacher.encoder
    out = {name: value.clone() for name, value in state.items() if not _LAYER.fullmatch(name)}
    for number, selection in enumerate(selections):
        prefix = f"encoder.layers.{selection.layer}."
        own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        channels = _channels(selection.heads, encoder.channels_per_head)
        inner = encoder.num_heads * encoder.channels_per_head
        rows = torch.cat([channels + part * inner for part in range(3)])
        own["attention.qkv.weight"] = own["attention.qkv.weight"][rows]
        own["attention.qkv.bias"] = own["attention.qkv.bias"][rows]
        own["attention.out.weight"] = own["attention.out.weight"][:, channels]
        for name, units in (("ff1", selection.ff1), ("ff2", selection.ff2)):
            own[f"{name}.hidden.weight"] = own[f"{name}.hidden.weight"][units]
            own[f"{name}.hidden.bias"] = own[f"{name}.hidden.bias"][units]
            own[f"{name}.out.weight"] = own[f"{name}.out.weight"][:, units]
        out.update({f"encoder.layers.{number}.{name}": value.clone() for name, value in own.items()})
    return out


def _head_norms(state: State, prefix: str, cfg: EncoderConfig) -> Tensor:
    """(H,) norm of the values' weights times that of the output's, of each head."""
    heads, size = cfg.num_heads, cfg.channels_per_head
    values = state[prefix + "attention.qkv.weight"][2 * heads * size :].unflatten(0, (heads, size))
    out = state[prefix + "attention.out.weight"].unflatten(1, (heads, size))
    return values.flatten(1).norm(dim=1) * out.transpose(0, 1).flatten(1).norm(dim=1)


def _unit_norms(state: State, prefix: str) -> Tensor:
    """(F,) norm of what a unit reads by times that of what it writes by."""
    return state[prefix + "hidden.weight"].norm(dim=1) * state[prefix + "out.weight"].norm(dim=0)


def _largest(scores: Tensor, count: int) -> List[int]:
    """Indices of the largest, ascending; of equals the earlier ones."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def _channels(heads: List[int], size: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()
