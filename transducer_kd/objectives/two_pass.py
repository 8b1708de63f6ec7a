"""Training of the second pass: the LAS alone on a frozen first pass, and both passes together.

    L_las = (1 - alpha) CE + alpha tau^2 KL(teacher's LAS || LAS)
    L     = lambda (L_rnnt + beta L_kd) + (1 - lambda) L_las [+ weight * expected word errors]

All are sums over an utterance in nats (L_kd: its mean times the encoder frames; word errors: in words) and
are divided by the encoder frames together.
Each LAS attends to its own encoder: the teacher's to the teacher's, whatever its width.

Three-stage distillation: Dawalatabad et al., ASRU 2021. MWER: see losses/mwer.py.
N batch, T' encoder frames, U tokens, V vocabulary, B hypotheses of an utterance.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from transducer_kd.config import DistillConfig, LossConfig, TwoPassConfig
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.wer import word_errors
from transducer_kd.log import UserError
from transducer_kd.losses.attention import label_smoothed_ce, las_kd_loss, las_targets
from transducer_kd.losses.mwer import mwer_loss
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.transducer import Transducer
from transducer_kd.objectives.base import LossOutput, Objective
from transducer_kd.objectives.distill import DistillObjective, TeacherPass, teacher_pass

Encoded = Tuple[torch.Tensor, torch.Tensor]  # encoder_out (N,T',D), encoder_out_lens (N,)


def las_losses(
    model: Transducer,
    encoded: Encoded,
    batch: Any,
    options: TwoPassConfig,
    teacher: Any = None,
    taught: Optional[TeacherPass] = None,
) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
    """L_las of each utterance (N,), and its terms. Teacher and its pass are needed where alpha is not 0."""
    targets, mask = las_targets(batch.y, batch.y_lens)
    logits = model.las(*encoded, batch.y, batch.y_lens)
    terms = {"las_loss": label_smoothed_ce(logits, targets, mask, model.las.config.label_smoothing)}
    alpha = options.las_kd_weight
    losses = (1 - alpha) * terms["las_loss"]
    if alpha > 0:
        with torch.no_grad():
            teacher_logits = teacher.las(taught.encoder_out, taught.encoder_out_lens, batch.y, batch.y_lens)
        terms["las_kd_loss"] = las_kd_loss(logits, teacher_logits, mask, options.las_kd_temperature)
        losses = losses + alpha * terms["las_kd_loss"]
    return losses, terms


def check_teacher_las(options: TwoPassConfig, teacher: Optional[Frozen]) -> None:
    """UserError where the LAS is to be distilled from a teacher that has none."""
    if options.las_kd_weight > 0 and teacher.module.las is None:
        raise UserError(
            f"two_pass.las_kd_weight={options.las_kd_weight}, but the teacher has no LAS; use a phase that "
            "was trained with objective las or two_pass (teacher_las), or set the weight to 0"
        )


class LasObjective(Objective):
    """L_las with everything but the LAS frozen: the first pass's results stay what they are, to the bit."""

    trains_first_pass = False

    def __init__(
        self,
        model: Transducer,
        spec_augment: SpecAugment,
        options: TwoPassConfig,
        teacher: Optional[Frozen] = None,
    ):
        super().__init__()
        check_teacher_las(options, teacher)
        self.model = model
        self.spec_augment = spec_augment
        self.options = options
        self.frozen = teacher
        model.requires_grad_(False)
        model.las.requires_grad_(True)

    def train(self, mode: bool = True) -> "LasObjective":
        """The first pass stays in eval: the LAS has to read what it will read when it rescores."""
        super().train(mode)
        self.model.eval()
        self.model.las.train(mode)
        return self

    def forward(self, batch: Any, step: int) -> LossOutput:
        x = self.spec_augment(batch.features, batch.feature_lens, step)
        with torch.no_grad():
            encoded = self.model.encode(x, batch.feature_lens)
        teacher = self.frozen.module if self.frozen is not None else None
        taught = teacher_pass(teacher, batch, with_decoder=False) if teacher is not None else None
        losses, terms = las_losses(self.model, encoded, batch, self.options, teacher, taught)
        return LossOutput.of_terms(losses, encoded[1], terms)


class TwoPassObjective(DistillObjective):
    """Deep finetuning: encoder, decoder, joiner and LAS together, with or without a teacher.

    to_words: token ids -> words, for the word errors of MWER.
    """

    def __init__(
        self,
        model: Transducer,
        loss: LossConfig,
        spec_augment: SpecAugment,
        distill: DistillConfig,
        options: TwoPassConfig,
        teacher: Optional[Frozen],
        to_words: Callable[[List[int]], List[str]],
    ):
        super().__init__(model, loss, spec_augment, distill, teacher)
        check_teacher_las(options, teacher)
        self.two_pass = options
        self.to_words = to_words

    def forward(self, batch: Any, step: int) -> LossOutput:
        done, taught, first, terms = self.first_pass(batch, step)
        encoded = done.encoder_out, done.encoder_out_lens
        second, las_terms = las_losses(self.model, encoded, batch, self.two_pass, self.teacher, taught)
        terms.update(las_terms)
        share = self.two_pass.rnnt_weight
        losses = share * first + (1 - share) * second
        # Validation goes without: its n-best lists take longer than all the rest.
        if self.two_pass.mwer_weight > 0 and self.training:
            terms["mwer_loss"] = self.expected_errors(encoded, batch)
            losses = losses + self.two_pass.mwer_weight * terms["mwer_loss"]
        return LossOutput.of_terms(losses, done.encoder_out_lens, terms)

    def expected_errors(self, encoded: Encoded, batch: Any) -> torch.Tensor:
        """MWER (N,): word errors of the first pass's n-best, weighed by the LAS's probabilities."""
        encoder_out, encoder_out_lens = encoded
        self.model.eval()  # no dropout in decoder and joiner; encoder_out is the training pass's
        with torch.no_grad():
            nbests = modified_beam_search(
                self.model, encoder_out.detach(), encoder_out_lens, self.two_pass.mwer_nbest
            )
        self.model.train()
        hyps = [[hyp.tokens for hyp in nbest] for nbest in nbests]
        errors = [
            torch.tensor([float(word_errors(text.split(), self.to_words(tokens))) for tokens in nbest])
            for text, nbest in zip(batch.texts, hyps)
        ]
        scores = self.model.las.score(encoder_out, encoder_out_lens, hyps)
        scores, errors = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (scores, errors))
        counts = torch.tensor([len(nbest) for nbest in hyps], device=scores.device)
        mask = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
        return mwer_loss(scores, errors.to(scores.device), mask)
