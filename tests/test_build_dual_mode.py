"""Building the phases of recipe dual_mode: first weights, masks, validation of both modes."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from transducer_kd import build
from transducer_kd.config import TeacherConfig, load_config, to_dict
from transducer_kd.data.batch import Batch
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.log import UserError
from transducer_kd.models.supernet import Supernet
from transducer_kd.models.wav2vec2 import Wav2Vec2
from transducer_kd.objectives.dual_mode import DualModeObjective
from transducer_kd.objectives.transducer import TransducerObjective
from transducer_kd.objectives.wav2vec2 import Wav2Vec2Objective
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train.trainer import Trainer, Validation

sys.path.insert(0, str(Path(__file__).parent / "train"))
from toy import run_killed_after  # noqa: E402

TEXTS = ["TURN ON THE LIGHTS", "PLAY MUSIC", "SET A TIMER FOR TEN MINUTES"]
SMALL = [
    "model.encoder.num_layers=2", "model.encoder.encoder_dim=16", "model.encoder.num_heads=2",
    "model.encoder.feedforward_dim=24", "model.encoder.cnn_module_kernel=5", "model.decoder.decoder_dim=12",
    "model.encoder.subsampling_channels=2", "model.joiner_dim=10", "model.encoder.chunk_size=4",
    "loss.backend=torch", "loss.s_range=3", "wav2vec2.num_entries=8", "wav2vec2.codebook_dim=6",
    "wav2vec2.projection_dim=5",
]  # fmt: skip
UNITS = ["model.pruned_groups=unit", "pruning.sparsity=0.5", "pruning.num_steps=100"]
PRETRAIN = ["objective=wav2vec2", "spec_augment.enabled=false"]
BLOCKS = ["model.pruned_groups=block8x1", *UNITS[1:]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(TEXTS * 3, tmp_path_factory.mktemp("lang"), 30)


def built(tokenizer, *overrides):
    config = load_config(None, [*SMALL, f"data.lang_dir={tokenizer.path.parent}", *overrides])
    return config, *build.build_objective(config, tokenizer)


def save(exp_dir, tokenizer, config, model):
    content = {
        "model": model.state_dict(),
        "model_avg": ckpt.start_running_average(model),
        "progress": {"step": 1},
        "config": to_dict(config),
        "bpe_sha256": tokenizer.sha256,
    }
    ckpt.save_checkpoint(exp_dir / "epoch-1.pt", content)


@pytest.fixture
def pretrained(tokenizer, tmp_path):
    """A phase that was pretrained, with masks of its own -> its folder, its model."""
    config, objective, _ = built(tokenizer, *PRETRAIN, "train.seed=5", *UNITS)
    objective.model.masks.ff1[:, ::3] = False
    save(tmp_path, tokenizer, config, objective.model)
    return tmp_path, objective.model


@pytest.mark.parametrize(
    "overrides, objective_class, model_class, is_pruned",
    [
        ([*PRETRAIN, *UNITS], Wav2Vec2Objective, Wav2Vec2, True),
        (["objective=dual_mode", *UNITS], DualModeObjective, Supernet, True),
        (["objective=dual_mode", *BLOCKS], DualModeObjective, Supernet, True),
        (["objective=transducer", *UNITS], TransducerObjective, Supernet, True),
        (["objective=dual_mode", "model.pruned_groups=unit"], DualModeObjective, Supernet, False),
    ],
)
def test_what_is_built(tokenizer, overrides, objective_class, model_class, is_pruned):
    _, objective, origins = built(tokenizer, *overrides)
    assert type(objective) is objective_class and type(objective.model) is model_class and origins == {}
    assert (objective.pruner is not None) == is_pruned
    assert objective.after_step(1) == {}  # not yet


def test_a_supernet_begins_with_encoder_and_masks_of_the_pretraining(tokenizer, pretrained, caplog):
    folder, model = pretrained
    caplog.set_level("INFO")
    _, objective, origins = built(tokenizer, "objective=dual_mode", f"init.exp_dir={folder}", *UNITS)
    found, wanted = objective.model.state_dict(), model.state_dict()
    for name in found:
        if name.startswith(("encoder.", "masks.")):
            assert torch.equal(found[name], wanted[name]), name
    assert "fresh: decoder joiner simple_am_proj simple_lm_proj" in caplog.text
    assert origins["init"]["path"] == str(folder)


def test_a_las_does_not_begin_with_a_pretraining(tokenizer, pretrained):
    las = ["objective=las", "model.las.enabled=true", f"init.exp_dir={pretrained[0]}"]
    with pytest.raises(UserError, match="was pretrained without text.*begin with a trained transducer"):
        built(tokenizer, *las)


def test_sparsity_to_begin_with_needs_masks_to_begin_with(tokenizer):
    with pytest.raises(UserError, match=r"init\.exp_dir is not set.*whose masks pruning\.initial_sparsity"):
        built(tokenizer, "objective=dual_mode", *UNITS, "pruning.initial_sparsity=0.5")


@pytest.mark.parametrize("groups, found", [(UNITS, "0.10"), (BLOCKS, "0.00")])
def test_sparsity_to_begin_with_is_that_of_the_masks(tokenizer, pretrained, groups, found):
    begun = ["objective=dual_mode", f"init.exp_dir={pretrained[0]}", *groups]
    with pytest.raises(UserError, match=rf"initial_sparsity=0\.5, but the masks of .* leave {found} "):
        built(tokenizer, *begun, "pruning.initial_sparsity=0.5")


def test_masks_of_other_groups_begin_fresh(tokenizer, pretrained):
    _, objective, _ = built(tokenizer, "objective=dual_mode", f"init.exp_dir={pretrained[0]}", *BLOCKS)
    assert objective.model.masks.sparsity() == 0.0
    assert torch.equal(objective.model.encoder.norm.weight, pretrained[1].encoder.norm.weight)


def test_a_dense_model_may_be_pruned_afterwards(tokenizer, tmp_path):
    config, objective, _ = built(tokenizer, "train.seed=3")
    save(tmp_path, tokenizer, config, objective.model)
    _, pruned, _ = built(tokenizer, f"init.exp_dir={tmp_path}", *UNITS)
    x, lens = torch.randn(1, 60, 80), torch.tensor([60])
    with torch.no_grad():
        for chunk_size in (0, 4):
            dense, same = (m.eval().encode(x, lens, chunk_size)[0] for m in (objective.model, pruned.model))
            assert torch.allclose(dense, same, atol=1e-6)


def test_an_encoder_of_another_width_is_named(tokenizer, pretrained):
    wider = ["model.encoder.feedforward_dim=32", f"init.exp_dir={pretrained[0]}", "objective=dual_mode"]
    with pytest.raises(UserError, match=r"does not fit.*ff1\.hidden\.bias is \(24,\) there and \(32,\) here"):
        built(tokenizer, *wider)


def test_a_pretrained_phase_is_not_for_recognition(tokenizer, pretrained):
    with pytest.raises(UserError, match="was pretrained without text and cannot recognise"):
        build.load_model(pretrained[0], lang_dir=str(tokenizer.path.parent))


@pytest.mark.parametrize("chunk_size, mode", [(-1, 4), (0, 0), (4, 4)])
def test_a_supernet_teaches_in_the_mode_that_is_asked_for(tokenizer, tmp_path, chunk_size, mode):
    config, objective, _ = built(tokenizer, "objective=dual_mode", *UNITS)
    masks = objective.model.masks
    masks.assign({**masks.kept(), "ff1": torch.zeros(2, 24, dtype=torch.bool)})
    save(tmp_path, tokenizer, config, objective.model)
    teacher, _ = build.build_teacher(
        TeacherConfig("exp_dir", str(tmp_path), use_averaged_model=False, chunk_size=chunk_size), tokenizer
    )
    x, lens = torch.randn(1, 60, 80), torch.tensor([60])
    with torch.no_grad():
        expected = objective.model.eval().encode(x, lens, mode)[0]
        assert torch.allclose(teacher.module.encode(x, lens)[0], expected, atol=1e-5)


def test_a_dense_phase_says_that_it_leaves_masks_behind(tokenizer, tmp_path, caplog):
    caplog.set_level("INFO")
    config, objective, _ = built(tokenizer, "objective=dual_mode", *UNITS)
    save(tmp_path, tokenizer, config, objective.model)
    built(tokenizer, f"init.exp_dir={tmp_path}")
    assert "fresh: nothing; left behind: masks" in caplog.text


class OneBatch:
    """A data module whose validation part is one batch."""

    def __init__(self, batch):
        self.batch = batch

    def valid_batches(self):
        yield self.batch


@pytest.fixture
def batch(tokenizer):
    tokens = tokenizer.encode(TEXTS[:2])
    y = torch.zeros(2, max(len(t) for t in tokens), dtype=torch.int64)
    for row, t in zip(y, tokens):
        row[: len(t)] = torch.tensor(t)
    lens = torch.tensor([160, 130])
    features = torch.randn(2, 160, 80, generator=torch.Generator().manual_seed(0)) * 3 - 8
    return Batch(features, lens, y, torch.tensor([len(t) for t in tokens]), ["a", "b"], TEXTS[:2])


def validated(objective, tokenizer, batch):
    with torch.no_grad():
        validator = build.Validator(OneBatch(batch), tokenizer, 2, torch.device("cpu"))
        return validator(objective.eval(), 0)


def test_validation_decodes_both_modes_and_shows_the_masks(tokenizer, batch):
    _, objective, _ = built(tokenizer, "objective=dual_mode", *UNITS)
    result = validated(objective, tokenizer, batch)
    assert {"wer", "wer_offline", "pruned_loss_offline", "pruned_loss_streaming"} <= result.metrics.keys()
    assert result.metrics["loss"] > result.metrics["pruned_loss_offline"]
    assert result.images["masks"].dim() == 2 and float(result.images["masks"].min()) == 1.0  # all are kept
    assert len(result.texts) == 2


def test_validation_of_the_pretraining_counts_codes_and_decodes_nothing(tokenizer, batch):
    _, objective, _ = built(tokenizer, *PRETRAIN, *UNITS)
    result = validated(objective, tokenizer, batch)
    assert result.texts == [] and "wer" not in result.metrics
    assert {"accuracy_offline", "accuracy_streaming", "chance", "perplexity_0"} <= result.metrics.keys()
    counts = result.histograms["codes_0"]
    assert len(counts) == 8 and int(counts.sum()) == int(result.histograms["codes_1"].sum()) > 0
    p = counts / counts.sum()
    assert result.metrics["perplexity_0"] == pytest.approx(
        float((-(p * (p + 1e-30).log()).sum()).exp()), rel=1e-4
    )
    assert validated(objective, tokenizer, batch).metrics == result.metrics  # the same frames are hidden


# ---------------------------------------------------------------- masks of a run that is killed


def trainer_of(exp_dir, tokenizer, batch):
    steps = ["train.max_steps=12", "train.save_every=2", "train.valid_every=100", "train.average_period=2"]
    pruning = ["pruning.begin_step=1", "pruning.num_steps=8", "pruning.refresh_every=3", "optim.lr=0.05"]
    config, objective, _ = built(tokenizer, "objective=dual_mode", *UNITS, *steps, *pruning)

    def batches(epoch, start):
        for number in range(start, 5):
            generator = torch.Generator().manual_seed(10 * epoch + number)
            features = torch.randn(batch.features.shape, generator=generator) * 3 - 8
            yield dataclasses.replace(batch, features=features)

    return Trainer(
        objective, config, exp_dir, torch.device("cpu"), batches, lambda o, step: Validation({"loss": 1.0})
    )


@pytest.mark.parametrize("stop_after", [3, 5, 10])  # between refreshes at 1, 4, 7, 9, and after the last
def test_a_killed_run_goes_on_with_its_masks_and_ends_with_the_same_ones(
    tokenizer, batch, tmp_path, stop_after
):
    whole = trainer_of(tmp_path / "whole", tokenizer, batch)
    whole.run()
    run_killed_after(trainer_of(tmp_path / "cut", tokenizer, batch), stop_after)
    resumed = trainer_of(tmp_path / "cut", tokenizer, batch)
    resumed.run()
    assert whole.objective.model.masks.refreshes == 4
    assert 0.2 < whole.objective.model.masks.sparsity() < 0.6
    found, expected = (t.objective.model.state_dict() for t in (resumed, whole))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert resumed.objective.model.masks.sparsity() == whole.objective.model.masks.sparsity()
    best = ckpt.load_checkpoint(tmp_path / "whole" / "best-valid.pt")  # of the last masks
    assert torch.equal(best["model"]["masks.refreshes"], torch.tensor(4))
