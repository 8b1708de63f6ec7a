"""Plain transducer training: simple loss, pruned loss and, where asked for, an auxiliary CTC loss.

N batch, T feature frames, T' encoder frames, U tokens, V vocabulary, D channels.
Source: pruned RNN-T, Kuang et al. 2022 (arXiv:2206.13236); CTC, Graves et al. 2006.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F

from transducer_kd.config import LossConfig
from transducer_kd.losses import pruned_rnnt
from transducer_kd.losses.lattice_recursion import Grads
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.transducer import Transducer
from transducer_kd.objectives.base import LossOutput, Objective


def warm_up_scales(step: int, warm_step: int, simple_loss_scale: float) -> Tuple[float, float]:
    """Weights (a, b) of the simple and the pruned loss at update `step`.

    a falls from 1 to `simple_loss_scale` and b rises from 0.1 to 1 over `warm_step` updates: the pruning
    bounds come from the simple loss, so it has to be worth something before the pruned loss can be.
    """
    if step >= warm_step:
        return simple_loss_scale, 1.0
    progress = step / warm_step
    return 1.0 - progress * (1.0 - simple_loss_scale), 0.1 + 0.9 * progress


@dataclass
class TransducerPass:
    """What one pass of the transducer loss computed, for objectives that add terms on the same nodes.

    encoder_out (N,T',D), encoder_out_lens (N,), decoder_out (N,U+1,D), boundary (N,4), occupancies that the
    lattice was pruned by (N,U,T') and (N,U+1,T'), ranges (N,T',s_range), logits (N,T',s_range,V), simple_loss
    and pruned_loss (N,).
    """

    encoder_out: torch.Tensor
    encoder_out_lens: torch.Tensor
    decoder_out: torch.Tensor
    boundary: torch.Tensor
    occupancies: Grads
    ranges: torch.Tensor
    logits: torch.Tensor
    simple_loss: torch.Tensor
    pruned_loss: torch.Tensor

    def select(self, rows: torch.Tensor) -> "TransducerPass":
        """That of the utterances `rows` (n,) int64, up to the last frame of the longest; U stays."""
        t = int(self.encoder_out_lens[rows].max())
        px, py = (occupancies[rows, :, :t] for occupancies in self.occupancies)
        return TransducerPass(
            self.encoder_out[rows, :t], self.encoder_out_lens[rows], self.decoder_out[rows],
            self.boundary[rows], (px, py), self.ranges[rows, :t], self.logits[rows, :t],
            self.simple_loss[rows], self.pruned_loss[rows],
        )  # fmt: skip


class TransducerObjective(Objective):
    """L = a(step) simple_loss + b(step) pruned_loss + ctc_weight CTC, summed over utterances; those with
    pseudo-labels weigh loss.pseudo_weight. The terms that are logged are of all utterances, not weighted.
    """

    def __init__(self, model: Transducer, loss: LossConfig, spec_augment: SpecAugment):
        super().__init__()
        self.model = model
        self.loss = loss
        self.spec_augment = spec_augment
        self.backend = pruned_rnnt.resolve_backend(loss.backend)

    def forward(self, batch: Any, step: int) -> LossOutput:
        done = self.transducer_pass(self.spec_augment(batch.features, batch.feature_lens, step), batch)
        losses, terms = self.transducer_loss(done, batch, step)
        return LossOutput.of_terms(losses, done.encoder_out_lens, terms)

    def transducer_loss(
        self, done: TransducerPass, batch: Any, step: int
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """The weighted sum (N,) of what `done` computed and of CTC, and its terms, each (N,)."""
        if self.training:
            simple_scale, pruned_scale = warm_up_scales(
                step, self.loss.warm_step, self.loss.simple_loss_scale
            )
        else:  # one scale for all validations, so that they can be compared
            simple_scale, pruned_scale = self.loss.simple_loss_scale, 1.0
        terms = {"simple_loss": done.simple_loss, "pruned_loss": done.pruned_loss}
        losses = simple_scale * done.simple_loss + pruned_scale * done.pruned_loss
        if self.model.ctc_output is not None and self.loss.ctc_weight > 0:
            terms["ctc_loss"] = self.ctc_loss(done.encoder_out, done.encoder_out_lens, batch)
            losses = losses + self.loss.ctc_weight * terms["ctc_loss"]
        if self.loss.pseudo_weight != 1:
            losses = losses * (1.0 + (self.loss.pseudo_weight - 1.0) * batch.is_pseudo)
        return losses, terms

    def transducer_pass(
        self,
        x: torch.Tensor,
        batch: Any,
        chunk_size: Optional[int] = None,
        guide: Optional[Callable[[Grads], Grads]] = None,
    ) -> TransducerPass:
        """Encode `x` (N,T,C) and compute both transducer losses on the batch's tokens.

        guide: from the simple loss's occupancies (N,U,T'), (N,U+1,T') to those to prune by.
        """
        encoder_out, encoder_out_lens = self.model.encode(x, batch.feature_lens, chunk_size=chunk_size)
        return self.lattice_pass(
            encoder_out, encoder_out_lens, self.model.decode_labels(batch.y), batch, guide
        )

    def lattice_pass(
        self,
        encoder_out: torch.Tensor,
        encoder_out_lens: torch.Tensor,
        decoder_out: torch.Tensor,
        batch: Any,
        guide: Optional[Callable[[Grads], Grads]] = None,
    ) -> TransducerPass:
        """Both transducer losses of what is encoded: (N,T',D), (N,), (N,U+1,D)."""
        model = self.model
        boundary = pruned_rnnt.make_boundary(batch.y_lens, encoder_out_lens)
        simple_loss, gradients = pruned_rnnt.simple_loss(
            lm=model.simple_lm_proj(decoder_out),
            am=model.simple_am_proj(encoder_out),
            symbols=batch.y,
            boundary=boundary,
            lm_scale=self.loss.lm_scale,
            am_scale=self.loss.am_scale,
            backend=self.backend,
        )
        # Before any backward: fast_rnnt's backward overwrites the occupation gradients.
        occupancies = gradients if guide is None else guide(gradients)
        ranges = pruned_rnnt.prune_ranges(*occupancies, boundary, self.loss.s_range)
        # Projected before pruning: T' + U + 1 rows instead of T' times s_range.
        am, lm = pruned_rnnt.gather_pruned(
            model.joiner.encoder_proj(encoder_out), model.joiner.decoder_proj(decoder_out), ranges
        )
        logits = model.joiner(am, lm, project_input=False)
        pruned_loss = pruned_rnnt.pruned_loss(logits, batch.y, ranges, boundary, self.backend)
        return TransducerPass(
            encoder_out, encoder_out_lens, decoder_out, boundary, occupancies, ranges, logits, simple_loss,
            pruned_loss,
        )  # fmt: skip

    def clean_pass(self, batch: Any) -> TransducerPass:
        """Without augmentation, but pruned as in training."""
        return self.transducer_pass(batch.features, batch)

    def ctc_loss(self, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor, batch: Any) -> torch.Tensor:
        """CTC losses (N,). Utterances that CTC cannot align (too many repeats for T') count as zero."""
        with torch.autocast(encoder_out.device.type, enabled=False):
            log_probs = self.model.ctc_output(encoder_out.float()).log_softmax(-1)
        return F.ctc_loss(
            log_probs.transpose(0, 1),
            batch.y,
            encoder_out_lens,
            batch.y_lens,
            blank=self.model.blank_id,
            reduction="none",
            zero_infinity=True,
        )

    @torch.no_grad()
    def images(self, batch: Any, step: int) -> Dict[str, torch.Tensor]:
        """`pruning_ranges` (U+1, T'): which nodes of the first utterance's lattice the pruned loss sees."""
        done = self.clean_pass(batch)
        frames, tokens = int(done.encoder_out_lens[0]), int(batch.y_lens[0]) + 1
        picture = torch.zeros(frames, tokens)
        kept = done.ranges[0, :frames].clamp(max=tokens - 1).cpu()
        picture.scatter_(1, kept, 1.0)
        return {"pruning_ranges": picture.t().flip(0)}
