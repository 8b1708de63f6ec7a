"""A supernet: two encoders in one set of weights, all of them for full context and a part for streaming.

With full context (chunk_size 0) the encoder runs with its weights theta, in streaming mode (chunk_size > 0)
with m*theta: the masks m leave whole groups of weights out. The gradient of a streaming loss is m*g, that of
a loss with full context g, so what is left out goes on learning there and may be chosen again (dual-mode
self-pruning, Liu et al. 2022, arXiv:2207.11906). What a group is:

    unit      a unit of a feed-forward module (its row of `hidden`, its column of `out`), or a head of the
              attention (its rows of `qkv`, its columns of `out`). Pointwise convolutions stay whole: with
              fewer channels, the LayerNorm between them would see other statistics. Biases stay as well; what
              a unit or head adds to the sum vanishes with its columns of `out`
    block8x1  8 consecutive rows of one column of any of the layer's matrices: what sparse kernels can skip

compress/pruning.py chooses the masks, compress/extract.py makes a stand-alone streaming model.

Shapes: L layers, N batch, T feature frames, T' encoder frames, D encoder_dim, F feedforward_dim, H heads,
    E channels of a head, R rows (outputs) and C columns of a matrix.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from transducer_kd.config import EncoderConfig, ModelConfig
from transducer_kd.log import UserError
from transducer_kd.models.conformer import Conformer
from transducer_kd.models.transducer import Transducer

try:
    from torch.func import functional_call
except ImportError:  # before torch 2.0
    from torch.nn.utils.stateless import functional_call

BLOCK_ROWS = 8
# The matrices of a layer, and whose masks they have where units are pruned.
MATRICES = {
    "ff1.hidden": "ff1",
    "ff1.out": "ff1",
    "attention.qkv": "heads",
    "attention.out": "heads",
    "conv.gate": None,
    "conv.out": None,
    "ff2.hidden": "ff2",
    "ff2.out": "ff2",
}


class PrunedMatrix(NamedTuple):
    """A weight of the encoder of which groups can be left out."""

    name: str  # in the encoder's state dict
    mask: str  # the buffer of GroupMasks that says which
    layer: int
    weight: Tensor  # (R, C)


class GroupMasks(nn.Module):
    """Which groups streaming mode keeps: bool buffers, True = kept, all of them at first.

    unit: ff1 (L, F), heads (L, H), ff2 (L, F). block8x1: ff1_hidden, ff1_out and so on, each (L, R/8, C).
    `refreshes` () int64 counts how often they were chosen anew. Set them with `assign` or load_state_dict.
    UserError where a matrix does not fall into blocks.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        encoder = cfg.encoder
        dim, heads, units = encoder.encoder_dim, encoder.num_heads, encoder.feedforward_dim
        self.num_heads = heads
        self.has_blocks = cfg.pruned_groups == "block8x1"
        if self.has_blocks:
            self.mask_of = {matrix: matrix.replace(".", "_") for matrix in MATRICES}
            shapes = {self.mask_of[matrix]: shape for matrix, shape in _blocks(encoder).items()}
            self.group_size = dict.fromkeys(shapes, BLOCK_ROWS)  # weights
        else:
            self.mask_of = {matrix: mask for matrix, mask in MATRICES.items() if mask}
            shapes = {"ff1": (units,), "heads": (heads,), "ff2": (units,)}
            of_head = 4 * encoder.channels_per_head * dim  # queries, keys, values, output
            self.group_size = {"ff1": 2 * dim, "heads": of_head, "ff2": 2 * dim}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.ones(encoder.num_layers, *shape, dtype=torch.bool))
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_after_load)
        self._measure()

    def kept(self) -> Dict[str, Tensor]:
        """The masks by name: (L, ...) bool, the buffers themselves."""
        return {name: getattr(self, name) for name in self.group_size}

    def assign(self, kept: Dict[str, Tensor]) -> None:
        """Take over newly chosen masks, all of them."""
        for name, mask in self.kept().items():
            mask.copy_(kept[name])
        self.refreshes += 1
        self._measure()

    def sparsity(self) -> float:
        """Share of the encoder's prunable weights that is masked."""
        return sum(self._layers) / len(self._layers)  # layers are alike

    def layer_sparsities(self) -> List[float]:
        """The same of each layer."""
        return self._layers

    def _measure(self) -> None:
        # Kept as numbers, because every pass needs them and a GPU would have to wait for each.
        masked = total = 0
        for name, mask in self.kept().items():
            flat = mask.flatten(1)
            masked = masked + self.group_size[name] * (~flat).sum(dim=1)
            total += self.group_size[name] * flat.size(1)
        self._layers: List[float] = [count / total for count in masked.tolist()]

    def matrices(self, encoder: Conformer) -> Iterator[PrunedMatrix]:
        """All weights that the masks are for."""
        for number, layer in enumerate(encoder.layers):
            for matrix, mask in self.mask_of.items():
                weight = layer.get_submodule(matrix).weight
                yield PrunedMatrix(f"layers.{number}.{matrix}.weight", mask, number, weight)

    def by_group(self, name: str, weight: Tensor) -> Tensor:
        """A view of weight `name`, or of what has its shape, that has the dimensions of its groups first:
        (R/8, C, 8), (H, 3, E, D), (H, D, E) or (F, D).
        """
        rows, columns = weight.shape
        if self.has_blocks:
            return weight.view(-1, BLOCK_ROWS, columns).transpose(1, 2)
        if name.endswith("attention.qkv.weight"):
            return weight.view(3, self.num_heads, -1, columns).transpose(0, 1)
        if name.endswith("attention.out.weight"):
            return weight.view(rows, self.num_heads, -1).transpose(0, 1)
        return weight if name.endswith("hidden.weight") else weight.t()

    def masked_weights(self, encoder: Conformer) -> Dict[str, Tensor]:
        """m*theta of all `matrices`, by name, with graph: a masked weight gets a gradient of zero."""
        masked = {}
        for name, mask, layer, weight in self.matrices(encoder):
            kept = torch.empty_like(weight, dtype=torch.bool)
            groups, own = self.by_group(name, kept), getattr(self, mask)[layer]
            groups.copy_(own.view(*own.shape, *(1,) * (groups.dim() - own.dim())))
            masked[name] = weight * kept
        return masked


class Supernet(Transducer):
    """A transducer whose encoder has masks for streaming mode. The `encoder` by itself knows nothing of them:
    what does not go through encode or encode_frames, as streaming_forward, needs plain().
    """

    def __init__(self, cfg: ModelConfig, vocab_size: int, with_ctc: bool = False) -> None:
        super().__init__(cfg, vocab_size, with_ctc)
        self.masks = GroupMasks(cfg)

    def encode_frames(
        self, frames: Tensor, lens: Tensor, chunk_size: Optional[int] = None
    ) -> Tuple[Tensor, Tensor]:
        """As in Transducer; in streaming mode with the masked weights, and with less dropout, as a smaller
        model needs: the configured one times (1 - sparsity).
        """
        chunk_size = self.config.encoder.chunk_size if chunk_size is None else chunk_size
        if chunk_size == 0:
            return super().encode_frames(frames, lens, chunk_size)
        weights = self.masks.masked_weights(self.encoder)
        dropout = self.config.encoder.dropout * (1 - self.masks.sparsity())
        return functional_call(
            _Frames(self.encoder),
            {f"encoder.{name}": weight for name, weight in weights.items()},
            (frames, lens, chunk_size, dropout),
        )

    @torch.no_grad()
    def plain(self, chunk_size: int) -> Transducer:
        """A model of its own for one mode, with the same outputs: theta for chunk_size 0, or else m*theta,
        which has zeros in it. Its configured chunk_size is this one.
        """
        encoder = dataclasses.replace(self.config.encoder, chunk_size=chunk_size)
        config = dataclasses.replace(self.config, encoder=encoder, pruned_groups="none")
        # First weights are drawn and at once replaced, without advancing a training's random generator.
        with torch.random.fork_rng(devices=[]):
            model = Transducer(config, self.vocab_size, with_ctc=self.ctc_output is not None)
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("masks.")}
        if chunk_size > 0:
            weights = self.masks.masked_weights(self.encoder)
            state.update({f"encoder.{name}": weight for name, weight in weights.items()})
        model.load_state_dict(state)
        return model.to(self.joiner.output_linear.weight.device).train(self.training)


class _Frames(nn.Module):
    """encode_frames as a module's forward, which is what functional_call can call."""

    def __init__(self, encoder: Conformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *args: Any) -> Tuple[Tensor, Tensor]:
        return self.encoder.encode_frames(*args)


def _after_load(masks: GroupMasks, _: Any) -> None:
    masks._measure()


def _blocks(encoder: EncoderConfig) -> Dict[str, Tuple[int, int]]:
    """Block rows and columns (R/8, C) of each of the MATRICES."""
    dim, units = encoder.encoder_dim, encoder.feedforward_dim
    inner = encoder.num_heads * encoder.channels_per_head
    shapes = {
        "ff1.hidden": (units, dim),
        "ff1.out": (dim, units),
        "attention.qkv": (3 * inner, dim),
        "attention.out": (dim, inner),
        "conv.gate": (2 * dim, dim),
        "conv.out": (dim, dim),
        "ff2.hidden": (units, dim),
        "ff2.out": (dim, units),
    }
    for matrix, (rows, _) in shapes.items():
        if rows % BLOCK_ROWS:
            raise UserError(
                f"model.pruned_groups=block8x1 needs matrices of a multiple of {BLOCK_ROWS} rows, but "
                f"{matrix} has {rows}: choose such model.encoder.encoder_dim, feedforward_dim, and "
                "num_heads times head_dim, or model.pruned_groups=unit"
            )
    return {matrix: (rows // BLOCK_ROWS, columns) for matrix, (rows, columns) in shapes.items()}
