"""A model of two modes: every batch is seen by the full-context pass and by the streaming pass.

    L = L_rnnt(theta, full context) + L_rnnt(m theta, streaming) [+ gamma L_kd(full context -> streaming)]

In a supernet the streaming pass has the masked weights m theta; without masks both modes are dense. gamma is
distill.weight. No teacher is loaded for it: the streaming pass learns from the full-context pass of the same
batch, without a gradient to it. That pass trains, so this teacher is given the augmented features and has
dropout, unlike one in a folder of its own: a clean pass would be a third one. And it begins as untrained as
its student, which is why it may begin to teach later (distill.begin_step).

The passes share the features, their subsampling and the decoder's output, and each has its backward before
the next begins.

Sources: dual-mode training, Yu et al. 2021 (arXiv:2010.06030); self-pruning, Liu et al. 2022
(arXiv:2207.11906). N batch, T' encoder frames, U tokens, D channels.
"""

from typing import Any, Dict, Optional, Tuple

import torch

from transducer_kd.config import DistillConfig, LossConfig
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.transducer import Transducer
from transducer_kd.objectives.base import LossOutput
from transducer_kd.objectives.distill import DistillObjective, TeacherPass
from transducer_kd.objectives.shared import MODES, SharedTensor
from transducer_kd.objectives.transducer import TransducerPass


class DualModeObjective(DistillObjective):
    """Both modes of `model`, whose encoder has a chunk size. What is logged is named by its mode."""

    num_passes = len(MODES)
    wer_chunk_sizes = (("wer", None), ("wer_offline", 0))

    def __init__(
        self, model: Transducer, loss: LossConfig, spec_augment: SpecAugment, distill: DistillConfig
    ):
        super().__init__(model, loss, spec_augment, distill, teacher=None)
        self._shared: Tuple[SharedTensor, ...] = ()  # subsampled frames (N,T',D), decoder_out (N,U+1,D)
        self._taught: Optional[TeacherPass] = None

    @property
    def teacher(self) -> Any:
        """The model itself."""
        return self.model

    def forward(self, batch: Any, step: int, number: int = 0) -> LossOutput:
        model = self.model
        if number == 0:
            x = self.spec_augment(batch.features, batch.feature_lens, step)
            frames, lens = model.encoder.subsample(x, batch.feature_lens)
            self._shared = SharedTensor(frames), SharedTensor(model.decode_labels(batch.y))
            frames, decoder_out = (shared.leaf() for shared in self._shared)
            encoder_out, _ = model.encode_frames(frames, lens, chunk_size=0)
            done = self.lattice_pass(encoder_out, lens, decoder_out, batch)
            self._taught = _as_teacher(done)
            losses, terms = self.transducer_loss(done, batch, step)
        else:
            frames, decoder_out = (shared.joined() for shared in self._shared)
            first, self._shared, self._taught = self._taught, (), None
            # Validation has one loss throughout, so that all of them can be compared.
            has_begun = step >= self.distill.begin_step or not self.training
            taught = first if has_begun else None
            lens = first.encoder_out_lens
            encoder_out, _ = model.encode_frames(frames, lens)
            done = self.lattice_pass(encoder_out, lens, decoder_out, batch, self._guide(taught, batch))
            losses, terms = self.transducer_loss(done, batch, step)
            if self.distill.weight > 0:
                terms["kd_loss"] = self.lattice_kd(done, taught, batch)
                losses = losses + self._weight(step) * terms["kd_loss"]
        return LossOutput.of_terms(losses, lens, _named(terms, MODES[number]))

    def _weight(self, step: int) -> float:
        """gamma at update `step`: it grows evenly, because at first the modes say very different things."""
        ramp = self.distill.ramp_steps
        grown = (step - self.distill.begin_step + 1) / ramp if ramp and self.training else 1.0
        return self.distill.weight * min(1.0, grown)

    def ask_teacher(self, batch: Any) -> TeacherPass:
        """A full-context pass by itself, without augmentation."""
        return _as_teacher(self.transducer_pass(batch.features, batch, chunk_size=0))


def _as_teacher(done: TransducerPass) -> TeacherPass:
    """The full-context pass, without its graph."""
    encoder_out, decoder_out = done.encoder_out.detach(), done.decoder_out.detach()
    return TeacherPass(encoder_out, done.encoder_out_lens, decoder_out, occupancies=done.occupancies)


def _named(terms: Dict[str, torch.Tensor], mode: str) -> Dict[str, torch.Tensor]:
    return {f"{name}_{mode}": value for name, value in terms.items()}
