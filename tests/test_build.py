"""From a configuration to a phase: first weights, teachers, what is refused, and one update with each."""

import warnings
from pathlib import Path
from typing import Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd import build
from transducer_kd.config import TeacherConfig, load_config, to_dict
from transducer_kd.data.batch import Batch
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.log import UserError, read_json, write_json
from transducer_kd.objectives.distill import DistillObjective
from transducer_kd.objectives.transducer import TransducerObjective
from transducer_kd.objectives.two_pass import LasObjective, TwoPassObjective
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train import experiment
from transducer_kd.train.optim import build_optimizer

TEXTS = ["TURN ON THE LIGHTS", "PLAY MUSIC", "SET A TIMER FOR TEN MINUTES"]
SMALL = [
    "model.encoder.num_layers=1", "model.encoder.encoder_dim=16", "model.encoder.num_heads=2",
    "model.encoder.feedforward_dim=24", "model.encoder.cnn_module_kernel=5", "model.decoder.decoder_dim=12",
    "model.encoder.subsampling_channels=2", "model.joiner_dim=10", "model.las.decoder_dim=10",
    "model.las.attention_dim=8", "model.las.num_heads=2", "loss.backend=torch", "loss.s_range=3",
]  # fmt: skip
WIDER = [
    "model.encoder.encoder_dim=24",
    "model.decoder.decoder_dim=20",
    "model.joiner_dim=14",
    "train.seed=1",
]
LAS = ["model.las.enabled=true"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(TEXTS * 3, tmp_path_factory.mktemp("lang"), 30)


@pytest.fixture
def batch(tokenizer):
    torch.manual_seed(1)
    tokens = tokenizer.encode(TEXTS)
    y = torch.zeros(3, max(len(t) for t in tokens), dtype=torch.int64)
    for row, t in zip(y, tokens):
        row[: len(t)] = torch.tensor(t)
    features = torch.randn(3, 160, 80) * 3 - 8
    return Batch(
        features,
        torch.tensor([160, 130, 155]),
        y,
        torch.tensor([len(t) for t in tokens]),
        ["a", "b", "c"],
        TEXTS,
    )


def configure(tokenizer, *overrides):
    return load_config(None, [*SMALL, f"data.lang_dir={tokenizer.path.parent}", *overrides])


def save_phase(exp_dir, tokenizer, *overrides, bpe_sha256=None):
    """A phase's folder with the weights it began with -> its model."""
    config = configure(tokenizer, *overrides)
    model = build.build_model(config, tokenizer.vocab_size)
    content = {
        "model": model.state_dict(),
        "model_avg": ckpt.start_running_average(model),
        "progress": {"step": 1},
        "config": to_dict(config),
        "bpe_sha256": bpe_sha256 or tokenizer.sha256,
    }
    ckpt.save_checkpoint(Path(exp_dir) / "epoch-1.pt", content)
    return model


def update(objective, batch):
    """One optimiser step -> the metrics, and which parts of the model changed."""
    before = {k: v.clone() for k, v in objective.model.state_dict().items()}
    optimizer = build_optimizer(objective.model, load_config(None).optim)
    out = objective.train()(batch, 0)
    (out.loss_sum / out.num_frames).backward()
    optimizer.step()
    changed = {
        k.split(".")[0] for k, v in objective.model.state_dict().items() if not torch.equal(v, before[k])
    }
    return out.metrics, changed


FIRST_PASS = {"encoder", "decoder", "joiner", "simple_am_proj", "simple_lm_proj"}


def test_each_objective_is_built_and_trains_its_part(tokenizer, batch, tmp_path):
    save_phase(tmp_path / "first", tokenizer)
    save_phase(tmp_path / "teacher", tokenizer, *WIDER, *LAS, "objective=two_pass")
    teacher, kd = ["teacher.kind=exp_dir", f"teacher.exp_dir={tmp_path / 'teacher'}"], ["distill.weight=1"]
    init, las_kd = [f"init.exp_dir={tmp_path / 'first'}"], ["two_pass.las_kd_weight=0.5"]
    for name, overrides, kind, origins, terms, trained in (
        ("transducer", [], TransducerObjective, set(), set(), FIRST_PASS),
        ("distill", teacher + kd, DistillObjective, {"teacher"}, {"kd_loss"}, FIRST_PASS),
        ("las", LAS + init, LasObjective, {"init"}, {"las_loss"}, {"las"}),
        ("las", LAS + init + teacher + las_kd, LasObjective, {"init", "teacher"}, {"las_kd_loss"}, {"las"}),
        (
            "two_pass",
            [*LAS, *init, *teacher, *kd, *las_kd, "two_pass.mwer_weight=0.1"],
            TwoPassObjective,
            {"init", "teacher"},
            {"kd_loss", "las_kd_loss", "mwer_loss"},
            FIRST_PASS | {"las"},
        ),
    ):
        objective, found = build.build_objective(
            configure(tokenizer, f"objective={name}", *overrides), tokenizer
        )
        assert type(objective) is kind and found.keys() == origins
        metrics, changed = update(objective, batch)
        assert terms <= metrics.keys() and changed == trained
        assert all(torch.isfinite(value) for value in metrics.values())


# ---------------------------------------------------------------- first weights


def test_a_phase_begins_with_the_earlier_one_and_a_fresh_las(tokenizer, tmp_path):
    earlier = save_phase(tmp_path, tokenizer, "train.seed=7", "loss.ctc_weight=0.5").state_dict()
    config = configure(tokenizer, "objective=two_pass", *LAS, f"init.exp_dir={tmp_path}")
    objective, origins = build.build_objective(config, tokenizer)
    fresh = build.build_model(config, tokenizer.vocab_size).state_dict()
    for name, value in objective.model.state_dict().items():
        assert torch.equal(value, fresh[name] if name.startswith("las.") else earlier[name]), name
    assert origins["init"]["path"] == str(tmp_path) and origins["init"]["checkpoint"] == "epoch-1"


def test_a_phase_that_has_a_las_hands_it_on(tokenizer, tmp_path):
    earlier = save_phase(tmp_path, tokenizer, "train.seed=7", "objective=two_pass", *LAS).state_dict()
    config = configure(tokenizer, "objective=two_pass", *LAS, f"init.exp_dir={tmp_path}")
    model = build.build_objective(config, tokenizer)[0].model
    assert all(torch.equal(value, earlier[name]) for name, value in model.state_dict().items())
    # A LAS may be left behind.
    config = configure(tokenizer, f"init.exp_dir={tmp_path}")
    model = build.build_objective(config, tokenizer)[0].model
    assert all(torch.equal(value, earlier[name]) for name, value in model.state_dict().items())


def test_selected_weights_name_the_phase_that_they_are_from(tokenizer, tmp_path):
    """A folder of local/compress.py: one checkpoint, without an optimizer, or progress."""
    config = configure(tokenizer, "train.seed=7")
    selected = build.build_model(config, tokenizer.vocab_size)
    origin = {"path": "exp/teacher", "checkpoint": "epoch-9", "sha256": "c" * 64}
    content = {
        "model": selected.state_dict(),
        "config": to_dict(config),
        "bpe_sha256": tokenizer.sha256,
        "selected_from": origin,
    }
    ckpt.save_checkpoint(tmp_path / "epoch-1.pt", content)
    started = configure(tokenizer, f"init.exp_dir={tmp_path}")
    assert (started.init.epoch, started.init.avg, started.init.use_averaged_model) == (0, 1, True)
    objective, origins = build.build_objective(started, tokenizer)
    expected = selected.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in objective.model.state_dict().items())
    assert origins["init"]["selected_from"] == origin and origins["init"]["path"] == str(tmp_path)


def test_a_training_that_was_taken_over_bears_this_recipes_name(tokenizer, tmp_path):
    save_phase(tmp_path, tokenizer)
    assert build.load_model(tmp_path).config.recipe == "two_pass"
    write_json(tmp_path / "config.json", to_dict(configure(tokenizer, "recipe=soft_hard")))
    assert build.load_model(tmp_path).config.recipe == "soft_hard"


@pytest.mark.parametrize(
    "there, here, named",
    [
        (WIDER, [], r"decoder\.conv\.bias is \(20,\) there and \(12,\) here"),
        (["model.encoder.num_layers=2"], [], r"encoder\.layers\.1\..* is \(\d+.*\) there and nothing here"),
        ([], ["model.encoder.num_layers=2"], r"encoder\.layers\.1\..* is nothing there and \(\d+.*\) here"),
        (["model.las.num_layers=2"], [], r"las\.lstm\..* there and nothing here"),
        ([], ["model.las.num_encoder_layers=1"], r"las\.layers\.0\..* is nothing there"),
    ],
)
def test_first_weights_that_do_not_fit_are_named(tokenizer, tmp_path, there, here, named):
    las = ["objective=two_pass", *LAS]
    save_phase(tmp_path, tokenizer, *las, *there)
    config = configure(tokenizer, *las, *here, f"init.exp_dir={tmp_path}")
    with pytest.raises(UserError, match=rf"init\.exp_dir=.* does not fit .*: {named}"):
        build.build_objective(config, tokenizer)


def test_first_weights_of_another_bpe_or_nowhere_are_refused(tokenizer, tmp_path):
    save_phase(tmp_path / "other", tokenizer, bpe_sha256="0" * 64)
    with pytest.raises(UserError, match="other was trained with another BPE model"):
        build.build_objective(configure(tokenizer, f"init.exp_dir={tmp_path / 'other'}"), tokenizer)
    with pytest.raises(UserError, match="nowhere holds no epoch-N.pt"):
        build.build_objective(configure(tokenizer, f"init.exp_dir={tmp_path / 'nowhere'}"), tokenizer)


def test_a_las_on_an_untrained_encoder_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"init\.exp_dir is not set"):
        build.build_objective(configure(tokenizer, "objective=las", *LAS), tokenizer)


# ---------------------------------------------------------------- teachers


def distill_from(tokenizer, **teacher):
    teacher = {"kind": "exp_dir", **teacher}
    keys = [f"teacher.{name}={value}" for name, value in teacher.items()]
    return configure(tokenizer, "objective=distill", "distill.weight=1", *keys)


def test_the_teacher_is_the_phase_in_eval(tokenizer, tmp_path):
    saved = save_phase(tmp_path, tokenizer, *WIDER, "model.encoder.dropout=0.5")
    objective, _ = build.build_objective(distill_from(tokenizer, exp_dir=tmp_path), tokenizer)
    teacher = objective.train().teacher
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in saved.state_dict().items())
    assert not any(m.training for m in teacher.modules()) and not any(
        p.requires_grad for p in teacher.parameters()
    )
    assert objective.model.config.encoder.encoder_dim == 16


def test_unsuitable_teachers_are_refused(tokenizer, tmp_path):
    save_phase(tmp_path / "plain", tokenizer)
    save_phase(tmp_path / "other", tokenizer, bpe_sha256="0" * 64)
    with pytest.raises(UserError, match=r"teacher\.exp_dir is not set"):
        build.build_objective(distill_from(tokenizer), tokenizer)
    with pytest.raises(UserError, match="no experiment folder .*nowhere"):
        build.build_objective(distill_from(tokenizer, exp_dir=tmp_path / "nowhere"), tokenizer)
    with pytest.raises(UserError, match="other was trained with another BPE model"):
        build.build_objective(distill_from(tokenizer, exp_dir=tmp_path / "other"), tokenizer)
    plain = ["teacher.kind=exp_dir", f"teacher.exp_dir={tmp_path / 'plain'}"]
    for objective in ("las", "two_pass"):
        config = configure(
            tokenizer, f"objective={objective}", *LAS, *plain, f"init.exp_dir={tmp_path / 'plain'}",
            "two_pass.las_kd_weight=0.5",
        )  # fmt: skip
        with pytest.raises(UserError, match="the teacher has no LAS"):
            build.build_objective(config, tokenizer)


def test_a_hash_tells_weights_apart(tokenizer, tmp_path):
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        save_phase(tmp_path / name, tokenizer, f"train.seed={seed}")

    def hashes(name):
        config = configure(
            tokenizer, "objective=distill", "distill.weight=1", "teacher.kind=exp_dir",
            f"teacher.exp_dir={tmp_path / name}", f"init.exp_dir={tmp_path / name}",
        )  # fmt: skip
        origins = build.build_objective(config, tokenizer)[1]
        assert {o["path"] for o in origins.values()} == {str(tmp_path / name)}
        return {who: origin["sha256"] for who, origin in origins.items()}

    a, again, b = hashes("a"), hashes("again"), hashes("b")
    assert a == again and len(a["teacher"]) == 64
    assert a["teacher"] != b["teacher"] and a["init"] != b["init"]


def test_a_run_does_not_go_on_with_a_retrained_teacher(tokenizer, tmp_path):
    config, run = distill_from(tokenizer, exp_dir=tmp_path / "teacher"), tmp_path / "run"

    def start():
        origins = build.build_objective(config, tokenizer)[1]
        experiment.prepare_exp_dir(run, config, 1, origins)
        experiment.write_meta(run, {"origins": origins})
        (run / "checkpoint-1.pt").touch()

    save_phase(tmp_path / "teacher", tokenizer)
    start()
    start()
    save_phase(tmp_path / "teacher", tokenizer, "train.seed=3")
    with pytest.raises(UserError, match="another configuration .weights of teacher: "):
        start()


# ---------------------------------------------------------------- pseudo-labels

SOFT = ["distill.utterances=pseudo", "distill.stored=true", "loss.pseudo_weight=0", "data.pseudo_share=0.5"]


@pytest.fixture
def label(tokenizer, tmp_path):
    """Function: run.json and summary.json as local/pseudo_label.py leaves them, by a phase in `teacher`."""

    def make(bpe_sha256=None, soft=None, seed=1):
        save_phase(tmp_path / "teacher", tokenizer, f"train.seed={seed}")
        teacher = TeacherConfig(kind="exp_dir", exp_dir=str(tmp_path / "teacher"))
        _, origin = build.build_teacher(teacher, tokenizer)
        folder = tmp_path / "labels"
        write_json(folder / "run.json", {"bpe_sha256": bpe_sha256 or tokenizer.sha256})
        write_json(folder / "summary.json", {"teacher": origin, "soft": soft, "sha256": "5e7" * 12})
        return folder

    return make


def test_the_pseudo_labels_are_among_the_origins(tokenizer, label, tmp_path):
    folder = label(soft={"dtype": "int8"})
    expected = {"path": str(folder), "checkpoint": "epoch-1", "sha256": "5e7" * 12}
    hard = configure(tokenizer, f"data.pseudo_labels={folder}", "loss.pseudo_weight=0.5")
    assert build.build_objective(hard, tokenizer)[1] == {"labels": expected}
    soft = distill_from(tokenizer, exp_dir=tmp_path / "teacher")
    soft.data.pseudo_labels, soft.distill.stored, soft.distill.utterances = str(folder), True, "pseudo"
    objective, origins = build.build_objective(soft, tokenizer)
    assert type(objective) is DistillObjective and origins["labels"] == expected
    assert build.build_data(soft.data, tokenizer, soft_targets=True).soft_targets


@pytest.mark.parametrize("setting", SOFT)
def test_what_needs_pseudo_labels_says_so(tokenizer, label, tmp_path, setting):
    label()
    teacher = ["teacher.kind=exp_dir", f"teacher.exp_dir={tmp_path / 'teacher'}", "distill.weight=1"]
    stored = [SOFT[0]] if setting == SOFT[1] else []
    config = configure(tokenizer, "objective=distill", *teacher, *stored, setting)
    with pytest.raises(UserError, match=r"there are no pseudo-labels: pass --set data\.pseudo_labels="):
        build.build_objective(config, tokenizer)


def test_pseudo_labels_that_do_not_fit_are_refused(tokenizer, label, tmp_path):
    def build_with(*settings):
        teacher = ["teacher.kind=exp_dir", f"teacher.exp_dir={tmp_path / 'teacher'}", "distill.weight=1"]
        given = [*teacher, f"data.pseudo_labels={tmp_path / 'labels'}", *settings]
        build.build_objective(configure(tokenizer, "objective=distill", *given), tokenizer)

    folder = label()
    build_with()
    with pytest.raises(UserError, match=r"has no stored teacher; label with .* --soft"):
        build_with(*SOFT)
    save_phase(tmp_path / "teacher", tokenizer, "train.seed=2")  # trained again since
    build_with()
    write_json(folder / "summary.json", {**read_json(folder / "summary.json"), "soft": {"dtype": "int8"}})
    with pytest.raises(
        UserError, match="labels is by epoch-1 of .*whose weights differ; label again with local/pseudo"
    ):
        build_with(*SOFT)
    label(bpe_sha256="0" * 64)
    with pytest.raises(UserError, match="labels was made with another BPE model"):
        build_with()
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match="labels has no summary.json, so its labels are not finished"):
        build_with()


# ---------------------------------------------------------------- somebody else's teacher


class Encoder(nn.Module):
    """T' is one less than ours for 160 frames, as a zipformer's."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(80, 7)

    def forward(self, x: Tensor, x_lens: Tensor) -> Tuple[Tensor, Tensor]:
        lens = ((x_lens - 7) // 2 + 1) // 2
        return self.linear(x)[:, 3::4][:, : lens.max().item()], lens


class Decoder(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 6)
        self.conv = nn.Conv1d(6, 6, 2)

    def forward(self, y: Tensor, need_pad: bool = True) -> Tensor:
        x = self.embedding(y).transpose(1, 2)
        return self.conv(F.pad(x, (1, 0)) if need_pad else x).transpose(1, 2)


class Joiner(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.encoder_proj = nn.Linear(7, 5)
        self.decoder_proj = nn.Linear(6, 5)
        self.output_linear = nn.Linear(5, vocab_size)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class Foreign(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(vocab_size)
        self.joiner = Joiner(vocab_size)
        self.simple_am_proj = nn.Linear(7, vocab_size)
        self.simple_lm_proj = nn.Linear(6, vocab_size)


def foreign_teacher(path, vocab_size, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Foreign(vocab_size)).save(str(path))
    return path


@pytest.mark.parametrize(
    "options",
    [
        ["distill.ranges_from=teacher", "distill.frame_shift=1", "distill.weighting=occupancy"],
        ["distill.lattice=full", "distill.form=collapsed", "distill.weighting=occupancy"],
    ],
)
def test_an_update_with_a_torchscript_teacher(tokenizer, batch, tmp_path, options):
    path = foreign_teacher(tmp_path / "jit_script.pt", tokenizer.vocab_size)
    other = foreign_teacher(tmp_path / "other.pt", tokenizer.vocab_size, seed=1)
    config = configure(
        tokenizer, "objective=distill", "distill.weight=1", "teacher.kind=torchscript",
        f"teacher.torchscript={path}", f"teacher.tokens={tokenizer.path.parent / 'tokens.txt'}", *options,
    )  # fmt: skip
    objective, origins = build.build_objective(config, tokenizer)
    before = {k: v.clone() for k, v in objective.teacher.state_dict().items()}
    metrics, changed = update(objective, batch)
    assert changed == FIRST_PASS and float(metrics["kd_loss"]) > 0.1
    assert all(torch.equal(v, before[k]) for k, v in objective.teacher.state_dict().items())
    assert not objective.teacher.training
    config.teacher.torchscript = str(other)
    again = build.build_objective(config, tokenizer)[1]
    assert (
        origins["teacher"]["path"] == str(path) and again["teacher"]["sha256"] != origins["teacher"]["sha256"]
    )


def test_a_torchscript_teacher_has_to_have_our_tokens_and_classes(tokenizer, tmp_path):
    tokens = tokenizer.path.parent / "tokens.txt"
    path = foreign_teacher(tmp_path / "jit_script.pt", tokenizer.vocab_size + 2)
    swapped = tmp_path / "tokens.txt"
    swapped.write_text(
        tokens.read_text().replace(" 5\n", " x\n").replace(" 6\n", " 5\n").replace(" x\n", " 6\n")
    )

    def build_with(**teacher):
        build.build_objective(distill_from(tokenizer, kind="torchscript", **teacher), tokenizer)

    with pytest.raises(UserError, match=r"teacher\.torchscript is not set"):
        build_with()
    with pytest.raises(UserError, match=r"teacher\.tokens is not set"):
        build_with(torchscript=path)
    with pytest.raises(UserError, match="differ first at id 5"):
        build_with(torchscript=path, tokens=swapped)
    with pytest.raises(UserError, match="has 32 classes and the student 30"):
        build_with(torchscript=path, tokens=tokens)
