"""Choosing which groups of a supernet's weights streaming mode leaves out, while it trains.

The share that is left out grows by the cubic schedule of Zhu & Gupta 2017 (arXiv:1710.01878), and what it is
made of is chosen anew every so many updates: the groups with the smallest norms, as in dual-mode self-pruning
(Liu et al. 2022, arXiv:2207.11906). In between, and when the schedule has ended, masks stay as they are. They
follow from the weights alone, so the processes of a DDP run need not talk about them.

Shapes: as in models/supernet.py; G groups of a layer that compete with each other.
"""

from typing import Dict, List

import torch
from torch import Tensor

from transducer_kd.config import PruningConfig
from transducer_kd.models.supernet import GroupMasks, Supernet

_BAND = 8  # pixels that a layer is high in a picture


def sparsity_at(step: int, cfg: PruningConfig) -> float:
    """Share to leave out after `step` updates: s_f + (s_i - s_f) (1 - (n - n_0) / N_s)^3, where s_i is
    initial_sparsity, s_f sparsity, n_0 begin_step and N_s num_steps; s_i before n_0, s_f after n_0 + N_s.
    """
    if step >= cfg.begin_step + cfg.num_steps:
        return cfg.sparsity
    left = 1.0 - max(0, step - cfg.begin_step) / cfg.num_steps
    # The same from the other end, because then s_i comes out exactly.
    return cfg.initial_sparsity + (cfg.sparsity - cfg.initial_sparsity) * (1.0 - left**3)


@torch.no_grad()
def group_scores(supernet: Supernet) -> Dict[str, Tensor]:
    """L2 norm of each group, in the shapes of the masks; in each layer's matrix divided by the root mean
    square of its groups' norms, because matrices differ in scale. Where a group is a part of two matrices
    (`unit`), the score is the root mean square of what both say.
    """
    masks = supernet.masks
    squares = {name: torch.zeros(mask.shape, device=mask.device) for name, mask in masks.kept().items()}
    for name, mask, layer, weight in masks.matrices(supernet.encoder):
        own = squares[mask][layer]
        square = masks.by_group(name, weight).square().flatten(own.dim()).sum(dim=-1)
        # A matrix of zeros has no scale.
        own += square / square.mean().clamp(min=torch.finfo(square.dtype).tiny)
    matrices = list(masks.mask_of.values())
    return {name: (value / matrices.count(name)).sqrt() for name, value in squares.items()}


def choose_masks(supernet: Supernet, sparsity: float) -> Dict[str, Tensor]:
    """The masks that keep the groups with the largest scores; of equals the earlier ones.

    unit: of ff1, of ff2 and of the heads of each layer round(sparsity * G) are left out, but for one: all
    layers keep equally many, as an encoder without masks needs it. block8x1: of all blocks of a layer
    together, so that a matrix with less to say loses more.
    """
    scores = group_scores(supernet)
    pools = [list(scores)] if supernet.masks.has_blocks else [[name] for name in scores]
    chosen: Dict[str, Tensor] = {}
    for names in pools:
        pool = torch.cat([scores[name].flatten(1) for name in names], dim=1)
        size = pool.size(1)
        kept = max(1, size - round(sparsity * size))
        largest = pool.argsort(dim=1, descending=True, stable=True)[:, :kept]
        mask = torch.zeros_like(pool, dtype=torch.bool).scatter_(1, largest, True)
        parts = mask.split([scores[name][0].numel() for name in names], dim=1)
        chosen.update({name: part.reshape(scores[name].shape) for name, part in zip(names, parts)})
    return chosen


class Pruner:
    """Keeps the masks of a supernet, or of anything with its `encoder` and `masks`, to the schedule. It has
    no state but the masks.
    """

    def __init__(self, supernet: Supernet, cfg: PruningConfig):
        self.supernet, self.cfg = supernet, cfg

    def __call__(self, step: int) -> Dict[str, float]:
        """To be called after every update, `step` of them -> what it did for TensorBoard, {} if nothing.

        Masks are chosen anew after update begin_step (if that is 0, they stay as they are), every
        refresh_every updates after it, and for the last time after begin_step + num_steps. kept_overlap:
        share of the groups kept now that were kept before.
        """
        if not self._is_due(step):
            return {}
        masks = self.supernet.masks
        before = {name: mask.clone() for name, mask in masks.kept().items()}
        masks.assign(choose_masks(self.supernet, sparsity_at(step, self.cfg)))
        kept = masks.kept()
        still = sum(int((kept[name] & before[name]).sum()) for name in kept)
        scalars = {
            "pruning/sparsity": masks.sparsity(),
            "pruning/kept_overlap": still / sum(int(mask.sum()) for mask in kept.values()),
        }
        layers = enumerate(masks.layer_sparsities())
        return {**scalars, **{f"pruning/sparsity_layer{layer}": share for layer, share in layers}}

    def _is_due(self, step: int) -> bool:
        since = step - self.cfg.begin_step
        return since == self.cfg.num_steps or (
            0 <= since < self.cfg.num_steps and since % self.cfg.refresh_every == 0
        )


def mask_image(masks: GroupMasks) -> Tensor:
    """All masks as a picture (8 L, W) in [0, 1], 1 for what is kept: layers below each other, each a band of
    8 pixels. In x, a pixel is a group of `unit`, or a column of a matrix of block8x1: the share of its blocks
    that is kept.
    """
    bands: List[Tensor] = [
        mask.float() if mask.dim() == 2 else mask.float().mean(dim=1) for mask in masks.kept().values()
    ]
    return torch.cat(bands, dim=1).repeat_interleave(_BAND, dim=0).cpu()
