"""Configuration: layers win in order, and every mistake names its key and its file."""

import dataclasses

import pytest

from transducer_kd import config_checks
from transducer_kd.config import PhaseConfig, from_dict, load_config, to_dict
from transducer_kd.log import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_layers_win_in_order(tmp_path):
    write(tmp_path / "base.yaml", "optim: {lr: 1.0, warmup_steps: 7}\nmodel: {joiner_dim: 9}\n")
    path = write(tmp_path / "phase.yaml", "base: base.yaml\noptim: {lr: 2e-3}\n")
    config = load_config(path, ["model.encoder.dropout=0", "data.train_parts=[a, b]"])
    assert (config.optim.lr, config.optim.warmup_steps, config.model.joiner_dim) == (2e-3, 7, 9)
    assert config.model.encoder.dropout == 0.0 and config.data.train_parts == ["a", "b"]
    assert config.train == PhaseConfig().train


def test_round_trip():
    config = load_config(None, ["loss.s_range=7"])
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim: {learning_rate: 1}", r"phase\.yaml: unknown key optim\.learning_rate"),
        ("optim: {warmup_step: 1}", r"did you mean warmup_steps\?"),
        ("model: {encoder: {num_layers: six}}", r"model\.encoder\.num_layers must be of type int, not 'six'"),
        ("train: {max_steps: 1.5}", r"train\.max_steps must be of type int"),
        ("train: {max_steps: true}", r"train\.max_steps must be of type int"),
        ("data: {train_parts: train}", r"data\.train_parts must be a list"),
        ("optim: 3", r"optim must be a section"),
        ("- a", r"expected sections"),
        ("optim: {lr: [", r"not valid YAML"),
        ("train: {precision: int8}", r"train\.precision='int8' is not one of fp32, bf16, fp16"),
        ("train: {max_steps: 0}", r"train\.max_steps=0 must be greater than 0"),
        ("model: {encoder: {encoder_dim: 100, num_heads: 3}}", r"encoder_dim=100 must be an even multiple"),
        ("model: {encoder: {cnn_module_kernel: 4}}", r"cnn_module_kernel=4 must be odd"),
        ("base: nowhere.yaml", r"nowhere\.yaml does not exist"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path / "phase.yaml", text))


def test_error_in_the_base_names_the_base(tmp_path):
    write(tmp_path / "base.yaml", "optim: {lrr: 1.0}\n")
    with pytest.raises(UserError, match=r"base\.yaml: unknown key optim\.lrr"):
        load_config(write(tmp_path / "phase.yaml", "base: base.yaml\n"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lr", "section.key=value"),
        ("optim.lrr=1", "did you mean lr"),
        ("optimm.lr=1", "did you mean optim"),
        ("optim.lr=fast", "must be of type float"),
        ("optim.lr.x=1", "unknown key optim.lr.x"),
    ],
)
def test_mistakes_in_an_override_are_named(override, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.encoder.dropout=1", r"model\.encoder\.dropout=1\.0 must be in \[0, 1\)"),
        ("model.decoder.dropout=-0.1", r"must be in \[0, 1\)"),
        ("model.encoder.feature_dim=40", "must be 80"),
        ("model.encoder.chunk_size=-1", "must be 0 or more"),
        ("model.encoder.left_context=-1", "must be 0 or more"),
        ("loss.lm_scale=1.5", r"must be in \[0, 1\]"),
        ("loss.am_scale=0.75", "must add up to less than 1"),
        ("loss.ctc_weight=-1", "must be 0 or more"),
        ("loss.simple_loss_scale=-1", "must be 0 or more"),
        ("loss.warm_step=-1", "must be 0 or more"),
        ("spec_augment.num_time_masks=-1", "must be 0 or more"),
        ("spec_augment.max_time_mask_fraction=1.1", r"must be in \[0, 1\]"),
        ("data.max_cut_s=0.2", r"data\.max_cut_s=0\.2 must be greater than data\.min_cut_s=0\.3"),
        ("data.max_cut_s=.inf", "must be finite"),
        ("data.num_workers=-1", "must be 0 or more"),
        ("data.musan_prob=2", r"must be in \[0, 1\]"),
        ("data.silence_prob=-0.1", r"data\.silence_prob=-0\.1 must be in \[0, 1\]"),
        ("data.silence_prob=1.1", r"must be in \[0, 1\]"),
        ("data.join_prob=1.1", r"data\.join_prob=1\.1 must be in \[0, 1\]"),
        ("data.musan_snr_db=[10]", "must be two numbers"),
        ("data.musan_snr_db=[20, 10]", "lowest, then the highest"),
        ("data.musan_snr_db=[.nan, 10]", "must be finite"),
        ("data.seed=-1", r"must be in \[0, 2147483648\)"),
        ("train.seed=2147483648", r"must be in \[0, 2147483648\)"),
        ("optim.lr=nan", r"optim\.lr=nan must be finite"),
        ("optim.lr=-1", "must be greater than 0"),
        ("optim.eps=0", "must be greater than 0"),
        ("optim.clip_norm=0", "must be greater than 0; a large number clips nothing"),
        ("optim.weight_decay=-1", "must be 0 or more"),
        ("optim.betas=[0.9]", "must be two numbers"),
        ("optim.betas=[0.9, 1.0]", r"must be in \[0, 1\)"),
        ("optim.warmup_steps=-1", "must be 0 or more"),
        ("optim.final_lr_ratio=1.5", r"must be in \[0, 1\]"),
        ("train.num_threads=-2", "must be 0 or more"),
        ("train.valid_wer_utterances=-1", "must be 0 or more"),
        ("train.max_nonfinite=-1", "must be 0 or more"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        load_config(None, [override])


TEACHER = ["teacher.kind=exp_dir"]
UNITS = ["model.pruned_groups=unit", "model.encoder.chunk_size=8"]
LAS = ["model.las.enabled=true"]
DISTILL = ["objective=distill", "distill.weight=1"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["objective=ctc"],
            "objective='ctc' is not one of transducer, distill, las, two_pass, dual_mode, wav2vec2",
        ),
        (["objective=dual_mode"], r"objective=dual_mode needs model\.encoder\.chunk_size"),
        (["model.pruned_groups=unit"], r"pruned_groups=unit is of streaming mode: set"),
        (["pruning.sparsity=0.5"], r"pruning\.sparsity=0\.5 needs model\.pruned_groups"),
        (
            [*UNITS, "pruning.sparsity=0.5", "pruning.initial_sparsity=0.6"],
            r"initial_sparsity=0\.6 must not be above pruning\.sparsity=0\.5",
        ),
        (
            ["objective=dual_mode", *UNITS, "distill.weight=1", *TEACHER],
            r"dual_mode distils from its own full-context pass: unset teacher\.kind",
        ),
        (
            [*UNITS, "pruning.sparsity=0.5", "pruning.begin_step=600", "pruning.num_steps=600"],
            r"begin_step=600 and num_steps=600 end after train\.max_steps=1000",
        ),
        (
            ["objective=las", *LAS, *UNITS, "pruning.sparsity=0.5"],
            r"pruning\.sparsity=0\.5 is not for objective=las, which keeps the masks",
        ),
        (
            ["objective=wav2vec2"],
            r"objective=wav2vec2 hides spans of its own .*: set spec_augment\.enabled=false",
        ),
        (
            ["objective=wav2vec2", "spec_augment.enabled=false", "data.silence_prob=0.1"],
            r"objective=wav2vec2 has nothing to learn from silence.*: set data\.silence_prob=0",
        ),
        (["wav2vec2.gumbel_end=3"], r"gumbel_end=3\.0 must not be above gumbel_start=2\.0"),
        (
            ["wav2vec2.num_codebooks=8", "wav2vec2.codebook_dim=128"],
            r"num_codebooks=8 make more codes than can be numbered",
        ),
        (["wav2vec2.codebook_dim=7"], r"codebook_dim=7 must be a multiple of num_codebooks=2"),
        (["teacher.kind=onnx"], r"teacher\.kind='onnx' is not one of none, exp_dir, torchscript"),
        (["distill.form=half"], r"distill\.form='half' is not one of full, collapsed"),
        (["objective=las"], r"objective=las trains the LAS: set model\.las\.enabled"),
        (["objective=two_pass"], r"objective=two_pass trains the LAS: set model\.las\.enabled"),
        (LAS, r"objective=transducer does not train a LAS.*unset model\.las\.enabled"),
        (
            ["objective=distill", "distill.weight=1", *TEACHER, *LAS],
            r"objective=distill does not train a LAS.*unset model\.las\.enabled",
        ),
        (
            ["distill.weight=1", *TEACHER],
            r"distill\.weight=1\.0 is for the objectives distill, two_pass and dual_mode",
        ),
        (["objective=las", *LAS, "distill.weight=1", *TEACHER], r"distill\.weight=1\.0 .* not las"),
        (
            ["two_pass.las_kd_weight=0.5", *TEACHER],
            r"las_kd_weight=0\.5 is for the objectives las and two_pass",
        ),
        (
            ["objective=las", *LAS, "two_pass.mwer_weight=1"],
            r"mwer_weight is for objective two_pass, not las",
        ),
        (["objective=distill", *TEACHER], r"objective=distill needs distill\.weight above 0"),
        (["objective=distill", "distill.weight=1"], r"needs a teacher: set teacher\.kind"),
        (["objective=las", *LAS, "two_pass.las_kd_weight=0.5"], r"needs a teacher: set teacher\.kind"),
        (TEACHER, r"objective=transducer .* uses no teacher: .* unset teacher\.kind"),
        (["objective=two_pass", *LAS, *TEACHER], r"objective=two_pass .* uses no teacher"),
        (
            ["objective=las", *LAS, "two_pass.las_kd_weight=0.5", "teacher.kind=torchscript"],
            r"a torchscript teacher has no LAS: set two_pass\.las_kd_weight to 0",
        ),
        (["two_pass.rnnt_weight=1.5"], r"two_pass\.rnnt_weight=1\.5 must be in \[0, 1\]"),
        (["two_pass.las_kd_weight=-0.1"], r"must be in \[0, 1\]"),
        (["two_pass.mwer_nbest=1"], "must be 2 or more"),
        (["init.exp_dir=a", "init.epoch=-1"], "init.use_averaged_model=false"),
        (["distill.temperature=0"], "must be greater than 0"),
        (["distill.frame_shift=-1"], "must be 0 or more"),
        (["distill.utterances_at_once=0"], "must be greater than 0"),
        (["teacher.epoch=-2"], r"must be in \[-1, inf\)"),
        (["distill.utterances=some"], r"distill\.utterances='some' is not one of all, pseudo"),
        (["data.pseudo_share=1"], r"data\.pseudo_share=1\.0 must be in \[0, 1\)"),
        (["loss.pseudo_weight=0"], r"leaves pseudo-labelled utterances to distillation"),
        (["objective=las", *LAS, "loss.pseudo_weight=0.5"], r"pseudo_weight is for objectives .* not las"),
        (
            [*DISTILL, *TEACHER, "distill.stored=true"],
            r"distill\.stored=true needs distill\.utterances=pseudo",
        ),
        (
            [*DISTILL, "teacher.kind=torchscript", "distill.utterances=pseudo", "distill.stored=true"],
            r"distill\.stored=true needs teacher\.kind=exp_dir",
        ),
        (
            ["objective=las", *LAS, "distill.utterances=pseudo"],
            r"distill\.utterances=pseudo is for objective distill, not las",
        ),
        (
            [
                *"objective=dual_mode model.encoder.chunk_size=4 distill.weight=1".split(),
                *"distill.begin_step=9 train.max_steps=9".split(),
            ],
            r"distill\.begin_step=9 is after the last update, train\.max_steps=9",
        ),  # fmt: skip
        (
            [*DISTILL, *TEACHER, "distill.begin_step=9"],
            r"distill\.begin_step and ramp_steps are for objective dual_mode, .*distill",
        ),
    ],
)
def test_objectives_use_what_is_asked_for(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=distill", "distill.weight=1", *TEACHER],
        ["objective=distill", "distill.weight=1", "teacher.kind=torchscript"],
        [*DISTILL, *TEACHER, "distill.utterances=pseudo", "distill.stored=true", "loss.pseudo_weight=0"],
        ["objective=transducer", "data.pseudo_share=0.5", "loss.pseudo_weight=0.5"],
        ["objective=las", *LAS],
        ["objective=las", *LAS, "data.silence_prob=1"],
        ["objective=dual_mode", *UNITS, "pruning.sparsity=0.5", "distill.weight=1"],
        ["objective=wav2vec2", "spec_augment.enabled=false", *UNITS],
        ["objective=las", *LAS, "two_pass.las_kd_weight=1", *TEACHER],
        ["objective=two_pass", *LAS, "two_pass.mwer_weight=1"],
        ["objective=two_pass", *LAS, "distill.weight=1", "teacher.kind=torchscript"],
        ["objective=two_pass", *LAS, "two_pass.las_kd_weight=0.5", *TEACHER],
    ],
)
def test_objectives_that_make_sense_are_accepted(overrides):
    assert load_config(None, overrides).objective == overrides[0].split("=")[1]


def test_every_number_has_a_range():
    def numbers(node, prefix=""):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from numbers(value, f"{prefix}{field.name}.")
            elif any(type(v) in (int, float) for v in (value if isinstance(value, list) else [value])):
                yield prefix + field.name

    listed = [key for keys in config_checks._RANGES.values() for key in keys.split()]
    assert sorted(listed) == sorted(numbers(PhaseConfig()))
