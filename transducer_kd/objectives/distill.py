"""Soft-target distillation of a transducer: its own loss, and the distance to a teacher on the same nodes.

    L = L_rnnt + beta L_kd

L_kd is each utterance's mean distance (over its nodes or its frames, by `normalise_by`), counted once for
every encoder frame. So beta weighs two means per frame, whatever the batch size, and the trainer's division
by the frames holds for both. The teacher sees the features without augmentation.

With distill.utterances=pseudo only utterances with pseudo-labels have an L_kd, and only they are pruned by
the teacher's bounds, where those are asked for. The kd_loss that is logged is still a mean over all frames:
times beta, it is what the loss has of it. kd_share is the share of the frames that have one, so that
kd_loss / kd_share is the mean distance over those.

N batch, T feature frames, T' encoder frames, U tokens, V vocabulary, D channels, S nodes kept per frame.
Sources: see losses/distill.py. Sharing the teacher's pruning bounds with the student is prior art as well.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch.utils.checkpoint import checkpoint

from transducer_kd.config import DistillConfig, LossConfig
from transducer_kd.log import UserError
from transducer_kd.losses import distill as kd
from transducer_kd.losses import pruned_rnnt
from transducer_kd.losses.lattice_recursion import Grads
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.transducer import Transducer
from transducer_kd.objectives.base import LossOutput
from transducer_kd.objectives.transducer import TransducerObjective, TransducerPass


@dataclass
class TeacherPass:
    """What the teacher computed for a batch, without graph: encoder_out (N,T',D), its lengths (N,), and, for
    the first pass, decoder_out (N,U+1,D). Its T' may differ from the student's by a frame or two.
    rows (n,) int64: the utterances of the batch that it is about; None: all.
    occupancies: by which it was pruned itself; None where it was not."""

    encoder_out: torch.Tensor
    encoder_out_lens: torch.Tensor
    decoder_out: Optional[torch.Tensor] = None
    rows: Optional[torch.Tensor] = None
    occupancies: Optional[Grads] = None


@torch.no_grad()
def teacher_pass(teacher: Any, batch: Any, with_decoder: bool = True, stored: bool = False) -> TeacherPass:
    """Run a teacher's encoder, and its prediction network where it is asked for, on the batch as it is.

    stored: take the encoder output that comes with the batch instead.
    """
    if stored:
        taught = TeacherPass(batch.teacher_out, batch.teacher_out_lens)
    else:
        taught = TeacherPass(*teacher.encode(batch.features, batch.feature_lens))
    if with_decoder:
        taught.decoder_out = teacher.decode_labels(batch.y)
    return taught


class DistillObjective(TransducerObjective):
    """Transducer loss plus lattice distillation. teacher: a Transducer or a ScriptedTransducer, or None
    where a subclass goes without.

    Raises UserError where the teacher's pruning bounds are asked for and it has no simple projections.
    """

    def __init__(
        self,
        model: Transducer,
        loss: LossConfig,
        spec_augment: SpecAugment,
        distill: DistillConfig,
        teacher: Optional[Frozen],
    ):
        super().__init__(model, loss, spec_augment)
        self.distill = distill
        self.frozen = teacher
        self.options = kd.LatticeDistillOptions(
            distill.form, distill.temperature, distill.frame_shift, distill.weighting, distill.normalise_by
        )
        if self._prunes_by_teacher and self.teacher.simple_am_proj is None:
            raise UserError(
                "distill.ranges_from=teacher, but this teacher has no simple_am_proj and simple_lm_proj to "
                "prune with; use distill.ranges_from=student"
            )

    @property
    def teacher(self) -> Any:
        """The teacher itself, None without one."""
        return self.frozen.module if self.frozen is not None else None

    @property
    def _prunes_by_teacher(self) -> bool:
        return self.distill.weight > 0 and self.distill.ranges_from == "teacher"

    def forward(self, batch: Any, step: int) -> LossOutput:
        done, _, losses, terms = self.first_pass(batch, step)
        return LossOutput.of_terms(losses, done.encoder_out_lens, terms)

    def first_pass(
        self, batch: Any, step: int
    ) -> Tuple[TransducerPass, Optional[TeacherPass], torch.Tensor, Dict[str, torch.Tensor]]:
        """The student's pass, the teacher's, the transducer's loss with distillation (N,), and its terms."""
        taught = self.ask_teacher(batch)
        x = self.spec_augment(batch.features, batch.feature_lens, step)
        done = self.transducer_pass(x, batch, guide=self._guide(taught, batch))
        losses, terms = self.transducer_loss(done, batch, step)
        # In training also where it is zero: all ranks log the same names.
        if self.distill.weight > 0 and (taught is not None or self.training):
            terms["kd_loss"] = self.lattice_kd(done, taught, batch)
            losses = losses + self.distill.weight * terms["kd_loss"]
            if self.distill.utterances == "pseudo":
                terms["kd_share"] = done.encoder_out_lens * batch.is_pseudo
        return done, taught, losses, terms

    def ask_teacher(self, batch: Any) -> Optional[TeacherPass]:
        """The teacher on the utterances to distill on; None, and no work, where there are none."""
        if self.frozen is None:
            return None
        rows = None
        if self.distill.utterances == "pseudo":
            rows = batch.is_pseudo.nonzero()[:, 0]
            if len(rows) == 0:
                return None
            if len(rows) == len(batch.y_lens):
                rows = None
        asked = batch if rows is None else batch.select(rows)
        taught = teacher_pass(self.teacher, asked, stored=self.distill.stored)
        taught.rows = rows
        return taught

    def clean_pass(self, batch: Any) -> TransducerPass:
        """See TransducerObjective."""
        taught = self.ask_teacher(batch) if self._prunes_by_teacher else None
        return self.transducer_pass(batch.features, batch, guide=self._guide(taught, batch))

    def _guide(self, taught: Optional[TeacherPass], batch: Any) -> Optional[Callable[[Grads], Grads]]:
        """What to prune by where it is not the student's own simple loss."""
        if taught is None or not self._prunes_by_teacher:
            return None
        rows = slice(None) if taught.rows is None else taught.rows
        lens, y, y_lens = taught.encoder_out_lens, batch.y[rows], batch.y_lens[rows]
        occupancies = taught.occupancies or self._teacher_occupancies(taught, y, y_lens)
        too_short = (lens < y_lens)[:, None, None]  # no path for the teacher, though one for the student

        def guide(own: Grads) -> Grads:
            shifted = _shifted(occupancies, self.distill.frame_shift, own[0].shape[-1], lens)
            px, py = (mine.clone() for mine in own)
            for mine, theirs in zip((px, py), shifted):
                mine[rows] = torch.where(too_short, mine[rows], theirs)
            return px, py

        return guide

    def lattice_kd(self, done: TransducerPass, taught: Optional[TeacherPass], batch: Any) -> torch.Tensor:
        """The distance to the teacher (N,): the utterance's mean times its encoder frames; 0 without one."""
        if taught is None:
            return torch.zeros_like(done.pruned_loss)
        if taught.rows is None:
            return self._distances(done, taught, batch)
        distances = torch.zeros_like(done.pruned_loss)
        rows = taught.rows
        distances[rows] = self._distances(done.select(rows), taught, batch.select(rows))
        return distances

    def _distances(self, done: TransducerPass, taught: TeacherPass, batch: Any) -> torch.Tensor:
        if self.distill.lattice == "full":
            losses, counts = self._full_lattice(done, taught, batch)
        else:
            losses, counts = self._pruned_lattice(done, taught, batch)
        return losses / counts.clamp(min=1) * done.encoder_out_lens

    def _pruned_lattice(
        self, done: TransducerPass, taught: TeacherPass, batch: Any
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """On the nodes whose logits the student's pruned loss has computed anyway."""
        logits, teacher_out, lens = kd.align_frames(
            done.logits, taught.encoder_out, done.encoder_out_lens, taught.encoder_out_lens
        )
        shift = self.options.frame_shift
        ranges = done.ranges[:, : logits.shape[1]]
        boundary = pruned_rnnt.make_boundary(batch.y_lens, lens)
        with torch.no_grad():
            teacher_logits = self._teacher_logits(
                teacher_out, taught.decoder_out, kd.shift_ranges(ranges, shift)
            )
            occupancy = None
            if self.options.weighting == "occupancy":
                passed, kept = teacher_logits, ranges
                if shift or not torch.equal(lens, done.encoder_out_lens):
                    # Shifted or cut, the student's windows may leave the teacher no path from start to end.
                    own = _shifted(done.occupancies, -shift, logits.shape[1], done.encoder_out_lens)
                    kept = pruned_rnnt.prune_ranges(*own, boundary, self.loss.s_range)
                    passed = self._teacher_logits(teacher_out, taught.decoder_out, kept)
                occupancy = kd.node_occupancy(passed, batch.y, kept, boundary)
        return kd.lattice_kd_loss(logits, teacher_logits, batch.y, ranges, boundary, self.options, occupancy)

    def _teacher_logits(
        self, encoder_out: torch.Tensor, decoder_out: torch.Tensor, ranges: torch.Tensor
    ) -> torch.Tensor:
        joiner = self.teacher.joiner
        am, lm = pruned_rnnt.gather_pruned(
            joiner.encoder_proj(encoder_out), joiner.decoder_proj(decoder_out), ranges
        )
        return joiner(am, lm, project_input=False)

    def _full_lattice(
        self, done: TransducerPass, taught: TeacherPass, batch: Any
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """On every node, a few utterances at a time; their logits are computed again for the gradient."""
        student_out, teacher_out, lens = kd.align_frames(
            done.encoder_out, taught.encoder_out, done.encoder_out_lens, taught.encoder_out_lens
        )
        joiner, taught_by = self.model.joiner, self.teacher.joiner
        am, lm = joiner.encoder_proj(student_out), joiner.decoder_proj(done.decoder_out)
        with torch.no_grad():
            teacher_am = taught_by.encoder_proj(teacher_out)
            teacher_lm = taught_by.decoder_proj(taught.decoder_out)
        few = self.distill.utterances_at_once
        found = []
        for start in range(0, len(lens), few):
            rows = slice(start, start + few)
            t, u = int(lens[rows].max()), int(batch.y_lens[rows].max())
            inputs = am[rows, :t], lm[rows, : u + 1], teacher_am[rows, :t], teacher_lm[rows, : u + 1]
            boundary = pruned_rnnt.make_boundary(batch.y_lens[rows], lens[rows])
            found.append(
                checkpoint(self._full_lattice_of, *inputs, batch.y[rows, :u], boundary, use_reentrant=False)
            )
        losses, counts = zip(*found)
        return torch.cat(losses), torch.cat(counts)

    def _full_lattice_of(
        self,
        am: torch.Tensor,
        lm: torch.Tensor,
        teacher_am: torch.Tensor,
        teacher_lm: torch.Tensor,
        symbols: torch.Tensor,
        boundary: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Projected encoder outputs (n,T',D) and decoder outputs (n,U+1,D) of both -> losses, counts (n,)."""
        ranges = kd.full_ranges(len(am), am.shape[1], symbols.shape[1], am.device)
        logits = _every_node(self.model.joiner, am, lm)
        with torch.no_grad():
            teacher_logits = _every_node(self.teacher.joiner, teacher_am, teacher_lm)
            occupancy = None
            if self.options.weighting == "occupancy":
                occupancy = kd.node_occupancy(teacher_logits, symbols, ranges, boundary)
        return kd.lattice_kd_loss(logits, teacher_logits, symbols, ranges, boundary, self.options, occupancy)

    @torch.no_grad()
    def _teacher_occupancies(self, taught: TeacherPass, y: torch.Tensor, y_lens: torch.Tensor) -> Grads:
        """What the teacher's simple loss would prune its own lattice by; y (N,U), y_lens (N,)."""
        _, occupancies = pruned_rnnt.simple_loss(
            lm=self.teacher.simple_lm_proj(taught.decoder_out),
            am=self.teacher.simple_am_proj(taught.encoder_out),
            symbols=y,
            boundary=pruned_rnnt.make_boundary(
                torch.minimum(y_lens, taught.encoder_out_lens), taught.encoder_out_lens
            ),
            lm_scale=self.loss.lm_scale,
            am_scale=self.loss.am_scale,
            backend=self.backend,
        )
        return occupancies


def _every_node(joiner: Any, am: torch.Tensor, lm: torch.Tensor) -> torch.Tensor:
    """(n,T',D), (n,U+1,D) -> logits (n,T',U+1,V)."""
    shape = (am.shape[0], am.shape[1], lm.shape[1], am.shape[2])
    return joiner(am[:, :, None].expand(shape), lm[:, None].expand(shape), project_input=False)


def _shifted(occupancies: Grads, shift: int, num_frames: int, lens: torch.Tensor) -> Grads:
    """Both (N,...,T') moved `shift` frames later (negative: earlier), cut or continued to `num_frames`.

    Before its first frame and after its last (lens (N,)) an utterance keeps what it has there: pruning bounds
    never fall, so that the bounds of frames without occupancies, u = 0, would be those of all before them.
    """
    frames = torch.arange(num_frames, device=lens.device) - shift
    frames = torch.minimum(frames, lens[:, None] - 1).clamp(min=0)[:, None]  # (N,1,num_frames)
    px, py = (o.gather(2, frames.expand(-1, o.shape[1], -1)) for o in occupancies)
    return px, py
