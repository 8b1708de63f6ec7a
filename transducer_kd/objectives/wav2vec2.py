"""wav2vec 2.0 pretraining of both modes of an encoder at once, without text.

    L = L_c(theta, full context) + L_c(m theta, streaming) + M_n (a L_d + b |z_n|^2)

L_c: the contrastive loss, summed over the masked frames, of which utterance n has M_n; L_d: the diversity
loss of the codes; |z_n|^2: the mean square of the utterance's subsampled frames before their norm, so that
they stay in range; a, b: wav2vec2.diversity_weight and penalty_weight. Both passes see the same masked frames
and are to find the same targets among the same distractors. Without a chunk size there is the first one only.

What the passes share, the subsampling and the quantiser, is computed once and gets its gradient in the last
pass, where L_d and |z_n|^2, which depend on nothing else, are added. All terms but L_d (of a batch's mean)
are sums over utterances, and so the same however a batch is cut.

Baevski et al. 2020 (arXiv:2006.11477); of both modes of a supernet: Liu et al. 2022 (arXiv:2207.11906).
N batch, T' encoder frames, F masked frames of the batch, M of the utterance with the most, D encoder_dim, E
channels that are compared, G codebooks, V entries of a codebook, K distractors.
"""

from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import torch

from transducer_kd.config import Wav2Vec2Config
from transducer_kd.losses.contrastive import (
    contrastive_loss,
    diversity_loss,
    perplexity,
    sample_distractors,
)
from transducer_kd.losses.precision import full_precision
from transducer_kd.models.masks import valid_mask
from transducer_kd.models.subsampling import subsampled_lens
from transducer_kd.models.wav2vec2 import Wav2Vec2, span_mask
from transducer_kd.objectives.base import LossOutput, Objective
from transducer_kd.objectives.shared import MODES, SharedTensor

_VALIDATION_SEED = 0  # the same frames are hidden in every validation


@dataclass
class MaskedBatch:
    """What the passes over one batch share.

    lens           (N,) encoder frames
    places         utterance and frame of each masked frame, (F,) twice
    masked_lens    (N,) masked frames
    hidden         (N,T',D) the frames, the masked ones replaced
    targets        (F,E)
    codes          (F,G), probabilities (F,G,V): see GumbelQuantizer
    projected      (N,T',D) the frames before their norm
    distractors    (N,M,K) indices of masked frames of the same utterance
    """

    lens: torch.Tensor
    places: Tuple[torch.Tensor, torch.Tensor]
    masked_lens: torch.Tensor
    hidden: SharedTensor
    targets: SharedTensor
    codes: torch.Tensor
    probabilities: torch.Tensor
    projected: torch.Tensor
    distractors: torch.Tensor

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """Masked frames x (F,...) -> (N,M,...), those of each utterance at the front, then zeros."""
        utterance, _ = self.places
        before = self.masked_lens.cumsum(0) - self.masked_lens
        slot = torch.arange(len(utterance), device=x.device) - before[utterance]
        return x.new_zeros(*self.distractors.shape[:2], *x.shape[1:]).index_put((utterance, slot), x)

    @property
    def contrasted_lens(self) -> torch.Tensor:
        """Masked frames (N,) that count: an utterance's only one has nothing to be told from."""
        return self.masked_lens * (self.masked_lens > 1)

    def ratio(self, total: torch.Tensor) -> torch.Tensor:
        """total / contrasted frames as a metric: multiplied by what the trainer divides every metric by."""
        return total.detach() / self.contrasted_lens.sum().clamp(min=1) * self.lens.sum()


class Wav2Vec2Objective(Objective):
    """See the module. max_steps: the update at which the quantiser's temperature has come down."""

    trains_first_pass = False

    def __init__(self, model: Wav2Vec2, options: Wav2Vec2Config, max_steps: int):
        super().__init__()
        self.model = model
        self.options = options
        self.max_steps = max_steps
        self.chunk_sizes = (0, model.config.encoder.chunk_size)
        self.num_passes = 2 if self.chunk_sizes[1] else 1
        self._shared: Optional[MaskedBatch] = None
        self._codes_seen: Optional[torch.Tensor] = None  # (G,V) counts, of validation

    def forward(self, batch: Any, step: int, number: int = 0) -> LossOutput:
        """Pass `number` over the frames that pass 0 has hidden."""
        if number == 0:
            self._shared = self._hide(batch, step)
        shared, is_last = self._shared, number == self.num_passes - 1
        hidden, targets = (x.joined() if is_last else x.leaf() for x in (shared.hidden, shared.targets))
        context = self.model.context(hidden, shared.lens, shared.places, self.chunk_sizes[number])
        digits = self.options.num_entries ** torch.arange(shared.codes.size(1), device=context.device)
        losses, correct, chance = contrastive_loss(
            shared.packed(context),
            shared.packed(targets),
            shared.packed((shared.codes * digits).sum(1)),
            shared.masked_lens,
            shared.distractors,
            self.options.similarity_temperature,
        )
        metrics = {
            f"contrastive_loss_{MODES[number]}": shared.ratio(losses.sum()),
            f"accuracy_{MODES[number]}": shared.ratio(correct.sum()),
        }
        if is_last:
            self._shared = None
            more, of_codes = self._regularisers(shared)
            losses = losses + more
            metrics.update(of_codes, chance=shared.ratio(chance.sum()))
        return LossOutput(losses, shared.lens, {**metrics, "loss": losses.detach().sum()})

    def _hide(self, batch: Any, step: int) -> MaskedBatch:
        """Draw masks and distractors, and quantise what is hidden."""
        options, model = self.options, self.model
        generator = None if self.training else torch.Generator().manual_seed(_VALIDATION_SEED)
        lens = subsampled_lens(batch.feature_lens)
        frames, projected = model.frames(batch.features)
        mask = span_mask(lens, frames.size(1), options.mask_prob, options.mask_length, generator)
        places, masked_lens = mask.nonzero(as_tuple=True), mask.sum(1)
        targets, probabilities, codes = model.targets(frames[places], self.gumbel_temperature(step))
        return MaskedBatch(
            lens,
            places,
            masked_lens,
            SharedTensor(model.hide(frames, mask)),
            SharedTensor(full_precision(targets)),
            codes,
            probabilities,
            projected,
            sample_distractors(masked_lens, options.num_distractors, generator),
        )

    def _regularisers(self, shared: MaskedBatch) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Weighted diversity loss and feature penalty (N,), and the metrics of what the passes share."""
        codes = shared.codes.t()
        counts = codes.new_zeros(shared.probabilities.shape[1:])
        counts.scatter_add_(1, codes, torch.ones_like(codes))
        if not self.training:
            self._codes_seen = counts if self._codes_seen is None else self._codes_seen + counts
        valid = valid_mask(shared.lens, shared.projected.size(1))
        squares = full_precision(shared.projected).square().mean(-1).masked_fill(~valid, 0.0)
        num_masked = shared.contrasted_lens
        penalty = squares.sum(1) / shared.lens.clamp(min=1) * num_masked
        diversity = diversity_loss(shared.probabilities) * num_masked
        metrics = {
            "diversity_loss": shared.ratio(diversity.sum()),
            "feature_penalty": shared.ratio(penalty.sum()),
            "masked_share": shared.masked_lens.sum(),
        }
        for g, use in enumerate(perplexity(counts)):
            metrics[f"perplexity_{g}"] = use * shared.lens.sum()
        return self.options.diversity_weight * diversity + self.options.penalty_weight * penalty, metrics

    def gumbel_temperature(self, step: int) -> float:
        """Of the quantiser at update `step`: geometric, from gumbel_start to gumbel_end."""
        start, end = self.options.gumbel_start, self.options.gumbel_end
        return start * (end / start) ** min(1.0, step / self.max_steps)

    def of_validation(self) -> Dict[str, float]:
        """The perplexity of the codes of the whole part: a batch has too few frames to use all entries."""
        if self._codes_seen is None:
            return {}
        return {f"perplexity_{g}": float(use) for g, use in enumerate(perplexity(self._codes_seen))}

    def histograms(self) -> Dict[str, torch.Tensor]:
        """`codes_<g>` (V,): how often validation has used each entry of a codebook since the last call."""
        counts, self._codes_seen = self._codes_seen, None
        return {} if counts is None else {f"codes_{g}": count for g, count in enumerate(counts)}
