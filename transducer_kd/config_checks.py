"""What the values of a PhaseConfig may be, alone and together: for config.py, once all layers are read."""

import math
from typing import Any

from transducer_kd.log import UserError

_CHOICES = {
    "objective": ("transducer", "distill", "las", "two_pass", "dual_mode", "wav2vec2"),
    "model.pruned_groups": ("none", "unit", "block8x1"),
    "teacher.kind": ("none", "exp_dir", "torchscript"),
    "distill.utterances": ("all", "pseudo"),
    "distill.lattice": ("pruned", "full"),
    "distill.ranges_from": ("student", "teacher"),
    "distill.form": ("full", "collapsed"),
    "distill.weighting": ("uniform", "occupancy"),
    "distill.normalise_by": ("nodes", "frames"),
    "model.decoder.kind": ("stateless", "lstm"),
    "loss.backend": ("auto", "k2", "fast_rnnt", "torch"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "train.precision": ("fp32", "bf16", "fp16"),
}
# What a number, or each number of a list, may be: [ and ] include the limit, ( and ) do not.
_RANGES = {
    "(0, inf)": "model.encoder.num_layers model.encoder.encoder_dim model.encoder.num_heads "
    "model.encoder.feedforward_dim model.encoder.subsampling_channels model.encoder.cnn_module_kernel "
    "model.decoder.decoder_dim model.decoder.context_size model.decoder.num_layers model.joiner_dim "
    "model.las.decoder_dim model.las.num_layers model.las.attention_dim model.las.num_heads "
    "loss.s_range data.max_duration_s data.max_cut_s data.num_buckets optim.lr optim.eps optim.clip_norm "
    "train.max_steps train.accumulate train.log_every train.valid_every train.save_every train.keep_last "
    "train.keep_epochs train.average_period init.avg teacher.avg distill.temperature "
    "distill.utterances_at_once two_pass.las_kd_temperature pruning.num_steps pruning.refresh_every "
    "wav2vec2.mask_length wav2vec2.num_codebooks wav2vec2.codebook_dim wav2vec2.projection_dim "
    "wav2vec2.num_distractors wav2vec2.similarity_temperature wav2vec2.gumbel_start wav2vec2.gumbel_end",
    "[2, inf)": "two_pass.mwer_nbest wav2vec2.num_entries",  # a list of one has no error to weigh
    "[0, inf)": "model.encoder.head_dim model.encoder.chunk_size model.encoder.left_context "
    "model.las.num_encoder_layers loss.simple_loss_scale loss.warm_step "
    "loss.ctc_weight loss.pseudo_weight spec_augment.begin_step spec_augment.num_time_masks "
    "spec_augment.max_time_mask_frames "
    "spec_augment.num_feature_masks spec_augment.max_feature_mask_bins data.min_cut_s data.num_workers "
    "distill.weight distill.begin_step distill.ramp_steps distill.frame_shift two_pass.mwer_weight "
    "pruning.begin_step wav2vec2.diversity_weight wav2vec2.penalty_weight "
    "optim.weight_decay optim.warmup_steps train.num_threads train.valid_wer_utterances train.max_nonfinite",
    "[0, 1)": "model.encoder.dropout model.decoder.dropout model.las.dropout model.las.label_smoothing "
    "data.pseudo_share optim.betas pruning.sparsity pruning.initial_sparsity",
    "(0, 1]": "data.train_share wav2vec2.mask_prob",
    "[-1, inf)": "init.epoch teacher.epoch teacher.chunk_size",
    "[0, 1]": "loss.lm_scale loss.am_scale spec_augment.max_time_mask_fraction data.musan_prob "
    "data.silence_prob data.join_prob optim.final_lr_ratio two_pass.rnnt_weight two_pass.las_kd_weight",
    "[0, 2147483648)": "data.seed train.seed",
    "(-inf, inf)": "data.musan_snr_db",
    "[80, 80]": "model.encoder.feature_dim",
}
_IN_WORDS = {
    "(0, inf)": "greater than 0",
    "[0, inf)": "0 or more",
    "[2, inf)": "2 or more",
    "[80, 80]": "80, as the features are",
}
_ADVICE = {"optim.clip_norm": "; a large number clips nothing"}


def check_values(config: Any, origin: str) -> None:
    """UserError that names the key, and `origin`, for a value of a PhaseConfig that cannot be meant."""
    for key, choices in _CHOICES.items():
        value = _lookup(config, key)
        if value not in choices:
            raise UserError(f"{origin}: {key}={value!r} is not one of {', '.join(choices)}")
    for interval, keys in _RANGES.items():
        for key in keys.split():
            _check_range(key, _lookup(config, key), interval, origin)
    for key in ("optim.betas", "data.musan_snr_db"):
        if len(_lookup(config, key)) != 2:
            raise UserError(f"{origin}: {key}={_lookup(config, key)} must be two numbers")
    low, high = config.data.musan_snr_db
    if low > high:
        raise UserError(
            f"{origin}: data.musan_snr_db=[{low:g}, {high:g}] must be the lowest, then the highest"
        )
    if config.loss.lm_scale + config.loss.am_scale >= 1:
        raise UserError(
            f"{origin}: loss.lm_scale={config.loss.lm_scale} and loss.am_scale={config.loss.am_scale} must "
            "add up to less than 1: the rest is the weight of the joint probabilities"
        )
    if config.data.max_cut_s <= config.data.min_cut_s:
        raise UserError(
            f"{origin}: data.max_cut_s={config.data.max_cut_s} must be greater than "
            f"data.min_cut_s={config.data.min_cut_s}: no cut is left to train on"
        )
    for key in ("init", "teacher"):
        chosen = getattr(config, key)
        if chosen.exp_dir and chosen.epoch == -1 and (chosen.avg > 1 or chosen.use_averaged_model):
            raise UserError(
                f"{origin}: {key}.epoch=-1 is best-valid.pt, which has no average: set {key}.avg=1 and "
                f"{key}.use_averaged_model=false"
            )
    _check_objective(config, origin)
    _check_pseudo_labels(config, origin)
    _check_pruning(config, origin)
    _check_codebooks(config.wav2vec2, origin)
    _check_encoder(config.model.encoder, origin)
    las = config.model.las
    if las.attention_dim % las.num_heads:
        raise UserError(
            f"{origin}: model.las.attention_dim={las.attention_dim} must be a multiple of "
            f"num_heads={las.num_heads}"
        )


def _check_objective(config: Any, origin: str) -> None:
    """What is asked for has to be used: a LAS or a teacher that nothing learns from is a mistake."""
    name, kd, las_kd = config.objective, config.distill.weight > 0, config.two_pass.las_kd_weight > 0
    uses_las = name in ("las", "two_pass")
    if uses_las != config.model.las.enabled:
        what = (
            "trains the LAS: set"
            if uses_las
            else "does not train a LAS, objectives las and two_pass do; unset"
        )
        raise UserError(f"{origin}: objective={name} {what} model.las.enabled")
    if kd and name not in ("distill", "two_pass", "dual_mode"):
        raise UserError(
            f"{origin}: distill.weight={config.distill.weight} is for the objectives distill, two_pass and "
            f"dual_mode, not {name}"
        )
    if (config.distill.begin_step or config.distill.ramp_steps) and name != "dual_mode":
        raise UserError(
            f"{origin}: distill.begin_step and ramp_steps are for objective dual_mode, whose teacher is not "
            f"trained yet, not {name}"
        )
    if kd and config.distill.begin_step >= config.train.max_steps:
        raise UserError(
            f"{origin}: distill.begin_step={config.distill.begin_step} is after the last update, "
            f"train.max_steps={config.train.max_steps}: nothing would be distilled; lower it, or set "
            "distill.weight=0"
        )
    if las_kd and not uses_las:
        raise UserError(
            f"{origin}: two_pass.las_kd_weight={config.two_pass.las_kd_weight} is for the objectives las and "
            f"two_pass, not {name}"
        )
    if config.two_pass.mwer_weight > 0 and name != "two_pass":
        raise UserError(f"{origin}: two_pass.mwer_weight is for objective two_pass, not {name}")
    if name == "wav2vec2" and config.spec_augment.enabled:
        raise UserError(
            f"{origin}: objective=wav2vec2 hides spans of its own (wav2vec2.mask_prob): set "
            "spec_augment.enabled=false"
        )
    if name == "wav2vec2" and config.data.silence_prob:
        raise UserError(
            f"{origin}: objective=wav2vec2 has nothing to learn from silence, all of whose frames are alike: "
            "set data.silence_prob=0"
        )
    has_teacher = config.teacher.kind != "none"
    if name == "distill" and not kd:
        raise UserError(f"{origin}: objective=distill needs distill.weight above 0; without, use transducer")
    if name == "dual_mode" and has_teacher:
        raise UserError(
            f"{origin}: objective=dual_mode distils from its own full-context pass: unset teacher.kind"
        )
    if name != "dual_mode" and (kd or las_kd) != has_teacher:
        want = "needs a teacher: set" if kd or las_kd else "uses no teacher: set distill.weight, or unset"
        raise UserError(f"{origin}: objective={name} with these weights {want} teacher.kind")
    if las_kd and config.teacher.kind == "torchscript":
        raise UserError(f"{origin}: a torchscript teacher has no LAS: set two_pass.las_kd_weight to 0")


def _check_pseudo_labels(config: Any, origin: str) -> None:
    """On pseudo-labelled utterances something has to learn, and to have what it learns from."""
    distill = config.distill
    if distill.stored and distill.utterances != "pseudo":
        raise UserError(
            f"{origin}: distill.stored=true needs distill.utterances=pseudo: only pseudo-labelled utterances "
            "have a stored teacher"
        )
    if distill.stored and config.teacher.kind != "exp_dir":
        raise UserError(f"{origin}: distill.stored=true needs teacher.kind=exp_dir, whose joiner is run")
    if distill.utterances == "pseudo" and config.objective != "distill":
        raise UserError(
            f"{origin}: distill.utterances=pseudo is for objective distill, not {config.objective}"
        )
    if config.loss.pseudo_weight != 1 and config.objective not in ("transducer", "distill"):
        raise UserError(
            f"{origin}: loss.pseudo_weight is for objectives transducer and distill, not {config.objective}"
        )
    if config.loss.pseudo_weight == 0 and config.objective != "distill":
        raise UserError(
            f"{origin}: loss.pseudo_weight=0 leaves pseudo-labelled utterances to distillation: set "
            "objective=distill, or leave data.pseudo_labels out"
        )


def _check_pruning(config: Any, origin: str) -> None:
    """Two modes need a chunk size, masks need groups."""
    encoder, groups = config.model.encoder, config.model.pruned_groups
    if config.objective == "dual_mode" and not encoder.chunk_size:
        raise UserError(f"{origin}: objective=dual_mode needs model.encoder.chunk_size, its streaming mode's")
    if groups != "none" and not encoder.chunk_size:
        raise UserError(
            f"{origin}: model.pruned_groups={groups} is of streaming mode: set model.encoder.chunk_size"
        )
    pruning = config.pruning
    if groups == "none" and (pruning.sparsity or pruning.initial_sparsity):
        raise UserError(f"{origin}: pruning.sparsity={pruning.sparsity} needs model.pruned_groups")
    if pruning.sparsity and config.objective not in ("transducer", "distill", "dual_mode", "wav2vec2"):
        raise UserError(
            f"{origin}: pruning.sparsity={pruning.sparsity} is not for objective={config.objective}, which "
            "keeps the masks of init.exp_dir: set it to 0"
        )
    if pruning.sparsity and pruning.begin_step + pruning.num_steps > config.train.max_steps:
        raise UserError(
            f"{origin}: pruning.begin_step={pruning.begin_step} and num_steps={pruning.num_steps} end after "
            f"train.max_steps={config.train.max_steps}: the masks have to be fixed before the training ends; "
            "lower them as well"
        )
    if pruning.initial_sparsity > pruning.sparsity:
        raise UserError(
            f"{origin}: pruning.initial_sparsity={pruning.initial_sparsity} must not be above "
            f"pruning.sparsity={pruning.sparsity}"
        )


def _check_codebooks(codes: Any, origin: str) -> None:
    """codes: section wav2vec2."""
    if codes.num_entries**codes.num_codebooks >= 2**62:
        raise UserError(
            f"{origin}: wav2vec2.num_entries={codes.num_entries} and num_codebooks={codes.num_codebooks} "
            "make more codes than can be numbered: lower one of them"
        )
    if codes.gumbel_end > codes.gumbel_start:
        raise UserError(
            f"{origin}: wav2vec2.gumbel_end={codes.gumbel_end} must not be above gumbel_start="
            f"{codes.gumbel_start}: the temperature falls"
        )
    if codes.codebook_dim % codes.num_codebooks:
        raise UserError(
            f"{origin}: wav2vec2.codebook_dim={codes.codebook_dim} must be a multiple of "
            f"num_codebooks={codes.num_codebooks}"
        )


def _check_range(key: str, value: Any, interval: str, origin: str) -> None:
    low, high = (float(limit) for limit in interval[1:-1].split(","))
    for number in value if isinstance(value, list) else [value]:
        above = low < number or (interval[0] == "[" and number == low)
        below = number < high or (interval[-1] == "]" and number == high)
        if not math.isfinite(number):
            raise UserError(f"{origin}: {key}={value} must be finite")
        if not (above and below):
            words = _IN_WORDS.get(interval, f"in {interval}")
            raise UserError(f"{origin}: {key}={value} must be {words}{_ADVICE.get(key, '')}")


def _check_encoder(encoder: Any, origin: str) -> None:
    if encoder.head_dim % 2:
        raise UserError(
            f"{origin}: model.encoder.head_dim={encoder.head_dim} must be even (rotary position embedding "
            "pairs the channels of a head)"
        )
    if not encoder.head_dim and encoder.encoder_dim % (2 * encoder.num_heads):
        raise UserError(
            f"{origin}: model.encoder.encoder_dim={encoder.encoder_dim} must be an even multiple of "
            f"num_heads={encoder.num_heads} (rotary position embedding pairs the channels of a head)"
        )
    if encoder.cnn_module_kernel % 2 == 0:
        raise UserError(f"{origin}: model.encoder.cnn_module_kernel={encoder.cnn_module_kernel} must be odd")


def _lookup(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config
