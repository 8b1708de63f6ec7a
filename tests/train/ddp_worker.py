"""One of the processes of test_ddp.py: a few updates of a tiny model on this rank's share of each batch.

Run with torchrun's environment variables, a folder and the name of an objective; writes gradients-<rank>.pt
there.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch

from transducer_kd.compress.pruning import Pruner
from transducer_kd.config import SpecAugmentConfig, load_config
from transducer_kd.data.batch import collate
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.masks import valid_mask
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.subsampling import subsampled_lens
from transducer_kd.models.supernet import Supernet
from transducer_kd.models.transducer import Transducer
from transducer_kd.models.wav2vec2 import Wav2Vec2
from transducer_kd.objectives import wav2vec2
from transducer_kd.objectives.distill import DistillObjective
from transducer_kd.objectives.dual_mode import DualModeObjective
from transducer_kd.objectives.transducer import TransducerObjective
from transducer_kd.objectives.two_pass import LasObjective, TwoPassObjective
from transducer_kd.train import checkpoint, ddp
from transducer_kd.train.trainer import Trainer, Validation

VOCAB = 9
ENCODER_DIM = 8
# Feature frames of the utterances of each batch; two batches make an update. Ranks share them out unevenly.
UTTERANCES = [(71, 40, 55, 90), (39, 62), (48, 48, 80), (95, 33, 60), (66, 51), (58, 44, 45)]
POISONED = 3  # number of the batch whose last utterance is not a number: its update must be dropped by all
SETTINGS = (
    f"model.encoder.num_layers=1 model.encoder.encoder_dim={ENCODER_DIM} model.encoder.num_heads=2 "
    "model.encoder.feedforward_dim=12 model.encoder.cnn_module_kernel=3 model.encoder.dropout=0 "
    "model.encoder.subsampling_channels=2 model.decoder.decoder_dim=6 model.joiner_dim=7 loss.backend=torch "
    "loss.ctc_weight=0.5 train.accumulate=2 train.max_steps=2 train.valid_every=100 optim.clip_norm=1e9"
).split()

LAS = (
    "model.las.enabled=true model.las.decoder_dim=8 model.las.attention_dim=8 model.las.num_heads=2 "
    "model.las.dropout=0 two_pass.las_kd_weight=0.4 teacher.kind=exp_dir"
).split()
SUPERNET = (
    "model.encoder.chunk_size=4 model.pruned_groups=unit pruning.sparsity=0.5 pruning.begin_step=1 "
    "pruning.num_steps=1 pruning.refresh_every=1"
).split()
OBJECTIVES = {
    "transducer": [],
    "las": ["objective=las", *LAS],
    "two_pass": ["objective=two_pass", "distill.weight=2", "distill.ranges_from=teacher", *LAS],
    # Soft targets, on pseudo-labelled utterances alone.
    "distill": (
        "objective=distill distill.weight=2 distill.ranges_from=teacher distill.utterances=pseudo "
        "distill.stored=true teacher.kind=exp_dir loss.pseudo_weight=0"
    ).split(),
    # Two passes of each batch, and masks, which gloo cannot send and each process chooses anew after updates.
    "dual_mode": ["objective=dual_mode", "distill.weight=1", *SUPERNET],
    # The diversity loss is of the mean of a batch, so that it depends on how batches are shared out.
    "wav2vec2": (
        "objective=wav2vec2 spec_augment.enabled=false loss.ctc_weight=0 wav2vec2.diversity_weight=0 "
        "wav2vec2.num_entries=8 wav2vec2.codebook_dim=8 wav2vec2.projection_dim=8 wav2vec2.num_distractors=5"
    ).split()
    + SUPERNET,
}

HAVE_MASKS = ("dual_mode", "wav2vec2")
KEPT = {"ff1": [[True, False] * 6], "ff2": [[False, True, True] * 4], "heads": [[True, False]]}


def build_objective(name, config):
    """Different weights on each rank, which rank 0's must replace; the same teacher on all."""
    torch.manual_seed(99)
    teacher = Frozen(Transducer(config.model, VOCAB))
    torch.manual_seed(ddp.rank())
    is_supernet = name in HAVE_MASKS
    model = (Supernet if is_supernet else Transducer)(config.model, VOCAB, with_ctc=name != "wav2vec2")
    augment = SpecAugment(SpecAugmentConfig(enabled=False))
    if is_supernet:
        model.masks.assign({part: torch.tensor(kept) for part, kept in KEPT.items()})
        if name == "wav2vec2":
            model = Wav2Vec2(model, config.wav2vec2)
            objective = wav2vec2.Wav2Vec2Objective(model, config.wav2vec2, config.train.max_steps)
        else:
            objective = DualModeObjective(model, config.loss, augment, config.distill)
        objective.pruner = Pruner(model, config.pruning)
        return objective
    if name == "las":
        return LasObjective(model, augment, config.two_pass, teacher)
    if name == "two_pass":
        return TwoPassObjective(
            model, config.loss, augment, config.distill, config.two_pass, teacher, to_words=str
        )
    if name == "distill":
        return DistillObjective(model, config.loss, augment, config.distill, teacher)
    return TransducerObjective(model, config.loss, augment)


@contextlib.contextmanager
def without_chance():
    """What pretraining draws would differ in other batches: every third frame is hidden, the next ones are
    its distractors, and the likeliest code is taken.
    """

    def hide_thirds(lens, num_frames, *_):
        return valid_mask(lens, num_frames) & (torch.arange(num_frames) % 3 == 0)

    def take_next(lens, num_distractors, *_):
        frame = torch.arange(int(lens.max()))[:, None] + 1 + torch.arange(num_distractors)
        return frame % lens[:, None, None]

    patched = {"span_mask": hide_thirds, "sample_distractors": take_next}
    no_noise = mock.patch.object(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
    with mock.patch.multiple(wav2vec2, **patched), no_noise:
        yield


def make_batch(number, first, last):
    """Utterances first..last-1 of a batch, padded to the longest of them.

    In the first update only the first utterances have pseudo-labels, later all others: of two ranks one has
    none. With a pseudo-label comes what a teacher's encoder might have said.
    """
    features, tokens, teacher_out = [], [], []
    for i, t in enumerate(UTTERANCES[number][first:last], first):
        generator = torch.Generator().manual_seed(100 * number + i)
        features.append(torch.randn(t, 80, generator=generator).numpy())
        tokens.append(torch.randint(3, VOCAB, (t // 20,), generator=generator).tolist())
        stored = torch.randn(subsampled_lens(t), ENCODER_DIM, generator=generator).numpy()
        teacher_out.append(stored if (i == 0) == (number < 2) else None)
    if number == POISONED and last == len(UTTERANCES[number]):
        features[-1][0] = float("nan")
    names = [f"cut-{number}-{i}" for i in range(first, last)]
    return collate(features, tokens, names, names, [out is not None for out in teacher_out], teacher_out)


def my_batches(epoch, start_batch):
    """All utterances when alone; of two ranks the first takes one utterance, the second the rest."""
    for number in range(start_batch, len(UTTERANCES)):
        size = len(UTTERANCES[number])
        if ddp.world_size() == 1:
            yield make_batch(number, 0, size)
        else:
            yield make_batch(number, 0, 1) if ddp.rank() == 0 else make_batch(number, 1, size)


class RecordingTrainer(Trainer):
    """Keeps the gradient of every update, and counts those that were dropped."""

    dropped = 0

    def _count_nonfinite(self, what):
        super()._count_nonfinite(what)
        self.dropped += 1

    def _apply_gradients(self, num_frames):
        norm = super()._apply_gradients(num_frames)
        named = {n: p.grad.clone() for n, p in self.objective.model.named_parameters() if p.grad is not None}
        self.gradients = [*getattr(self, "gradients", []), named]
        return norm


def train(exp_dir, name):
    """Run the updates of an objective; returns what was recorded."""
    config = load_config(None, [*SETTINGS, *OBJECTIVES[name]])
    objective = build_objective(name, config)
    trainer = RecordingTrainer(
        objective, config, exp_dir, torch.device("cpu"), my_batches, lambda o, step: Validation({"loss": 1.0})
    )
    saved = []
    save_checkpoint = checkpoint.save_checkpoint

    def counted(path, content):
        saved.append(path.name)
        save_checkpoint(path, content)

    checkpoint.save_checkpoint = counted
    with without_chance():
        trainer.run()
    return {
        "saved": saved,
        "gradients": trainer.gradients,
        "dropped": trainer.dropped,
        "audio_s": trainer.progress.audio_s,
        "sums": ddp.all_reduce_sum([1.0 + ddp.rank(), 10.0]),
        "masks": objective.model.masks.kept() if name in HAVE_MASKS else {},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = ddp.setup("cpu")
    folder = Path(sys.argv[1])
    result = train(folder / "exp", sys.argv[2])
    ddp.barrier()
    ddp.cleanup()
    torch.save(result, folder / f"gradients-{processes.rank}.pt")
