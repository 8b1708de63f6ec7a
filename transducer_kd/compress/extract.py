"""A supernet's streaming mode as a model of its own, for devices: the weights that its masks leave out are
gone (`unit`, smaller dense matrices) or zero (`block8x1`). Its outputs are those of the supernet.
"""

import dataclasses
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from transducer_kd.compress.select import LayerSelection, apply
from transducer_kd.config import ModelConfig
from transducer_kd.models.supernet import GroupMasks, Supernet
from transducer_kd.models.transducer import Transducer


def extract(supernet: Supernet) -> Tuple[ModelConfig, Dict[str, Tensor]]:
    """Configuration and state dict of a Transducer that streams with the supernet's chunk_size."""
    config = supernet.config
    plain = supernet.plain(config.encoder.chunk_size)
    if supernet.masks.has_blocks:
        return plain.config, plain.state_dict()
    selections = kept_units(supernet.masks)
    encoder = dataclasses.replace(
        config.encoder,
        num_heads=len(selections[0].heads),
        head_dim=config.encoder.channels_per_head,
        feedforward_dim=len(selections[0].ff1),
    )
    return dataclasses.replace(plain.config, encoder=encoder), apply(plain.state_dict(), selections, config)


@torch.no_grad()
def largest_difference(supernet: Supernet, student: Transducer) -> float:
    """Between the encoder outputs of both, which are in eval, streaming through the same random features; a
    share of the largest output where that is above 1.
    """
    generator = torch.Generator().manual_seed(0)
    config = supernet.config.encoder
    # Of the scale of log-mel energies, and long enough for frames to leave the left context.
    num_frames = config.left_context + 2 * config.chunk_size + 3
    x = 3 * torch.randn(2, 4 * num_frames, config.feature_dim, generator=generator) - 8
    lens = torch.tensor([x.size(1), x.size(1) - 5])
    found, expected = (m.encode(x, lens, config.chunk_size)[0] for m in (student, supernet))
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def kept_groups(masks: GroupMasks) -> List[Dict[str, Any]]:
    """What each layer keeps, for a record: numbers of the heads and units, or how many blocks of a matrix."""
    if not masks.has_blocks:
        return [dataclasses.asdict(selection) for selection in kept_units(masks)]
    counts = {name: mask.flatten(1).sum(dim=1).tolist() for name, mask in masks.kept().items()}
    layers = range(len(masks.layer_sparsities()))
    return [{"layer": layer, **{name: own[layer] for name, own in counts.items()}} for layer in layers]


def kept_units(masks: GroupMasks) -> List[LayerSelection]:
    """What each layer keeps, for masks of `unit`. ValueError where layers keep different numbers."""
    kept = masks.kept()
    selections = [
        LayerSelection(
            layer, **{name: mask[layer].nonzero().flatten().tolist() for name, mask in kept.items()}
        )
        for layer in range(len(masks.layer_sparsities()))
    ]
    counts = {(len(s.heads), len(s.ff1), len(s.ff2)) for s in selections}
    if len(counts) > 1 or any(ff1 != ff2 for _, ff1, ff2 in counts):
        raise ValueError(f"layers keep different numbers of (heads, units of ff1, units of ff2): {counts}")
    return selections
