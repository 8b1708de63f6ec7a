"""Typed configuration of one training phase.

A phase is described by one YAML file. It is read in three layers, later ones winning: the defaults below, the
YAML (which may name one `base:` file beside it, one level deep), and `--set section.key=value` overrides.
Unknown keys and wrong types are errors that name the key and where it came from, because a misspelt key that
is silently ignored costs a training run.

Units are in the names (`_s` seconds, `_ms` milliseconds); "encoder frames" are 40 ms (feature frames of 10 ms
after 4x subsampling).
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

from transducer_kd.config_checks import check_values
from transducer_kd.log import UserError


@dataclass
class EncoderConfig:
    """Conformer. `chunk_size` > 0 trains and decodes in streaming mode by default."""

    feature_dim: int = 80
    subsampling_channels: int = 32
    num_layers: int = 6
    encoder_dim: int = 144
    num_heads: int = 4
    head_dim: int = 0  # channels of a head, even; 0: encoder_dim / num_heads. Pruned heads leave it as it was
    feedforward_dim: int = 576
    cnn_module_kernel: int = 15  # odd; streaming mode masks the future half of the taps
    dropout: float = 0.1
    chunk_size: int = 0  # encoder frames; 0: full context
    left_context: int = 64  # encoder frames seen before a chunk; only used in streaming mode

    @property
    def channels_per_head(self) -> int:
        """head_dim, or what it stands for where it is 0."""
        return self.head_dim or self.encoder_dim // self.num_heads


@dataclass
class DecoderConfig:
    """Prediction network."""

    kind: str = "stateless"  # stateless | lstm
    decoder_dim: int = 256
    context_size: int = 2  # stateless only
    num_layers: int = 1  # lstm only
    dropout: float = 0.0


@dataclass
class LasConfig:
    """Second pass: an attention decoder that rescores the first pass's hypotheses."""

    enabled: bool = False
    num_encoder_layers: int = 0  # conformer layers of its own on encoder_out, always full context
    decoder_dim: int = 256
    num_layers: int = 1  # of the LSTM over tokens
    attention_dim: int = 256  # of all heads together
    num_heads: int = 4
    dropout: float = 0.1
    label_smoothing: float = 0.1


@dataclass
class ModelConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    joiner_dim: int = 256
    las: LasConfig = field(default_factory=LasConfig)
    # What is left out of the encoder in streaming mode (models/supernet.py): none | unit | block8x1.
    pruned_groups: str = "none"


@dataclass
class LossConfig:
    """Pruned transducer loss (arXiv:2206.13236) with an optional auxiliary CTC head."""

    backend: str = "auto"  # auto | k2 | fast_rnnt | torch
    s_range: int = 5
    lm_scale: float = 0.25
    am_scale: float = 0.0
    simple_loss_scale: float = 0.5  # reached after warm_step; starts at 1.0
    warm_step: int = 500
    ctc_weight: float = 0.0
    # Of all these losses on utterances of data.pseudo_labels; 0: only distillation learns there.
    pseudo_weight: float = 1.0


@dataclass
class InitConfig:
    """Weights that a phase begins with: those of an earlier phase, chosen as decoding chooses them.

    What the earlier phase did not have (a LAS, a CTC head) begins fresh.
    """

    exp_dir: str = ""  # empty: fresh weights
    epoch: int = 0  # 0: the last
    avg: int = 1
    use_averaged_model: bool = True


@dataclass
class TeacherConfig:
    """Whose outputs a phase learns from. It is never trained, and gets the features without augmentation."""

    kind: str = "none"  # none | exp_dir | torchscript
    exp_dir: str = (
        ""  # a trained phase of ours, of which epoch, avg and use_averaged_model choose the weights
    )
    epoch: int = 0
    avg: int = 1
    use_averaged_model: bool = True
    chunk_size: int = -1  # encoder frames, 0: full context, -1: its own. Of a model of two modes: which one
    torchscript: str = ""  # somebody else's model: icefall's jit_script.pt or cpu_jit.pt
    tokens: str = ""  # its tokens.txt, which has to be ours


@dataclass
class DistillConfig:
    """Soft-target distillation on the nodes of the transducer's lattice (losses/distill.py)."""

    # beta of L = L_rnnt + beta L_kd, both a mean per encoder frame; in objective two_pass times lambda.
    weight: float = 0.0
    # In objective dual_mode: the update from which on the offline mode teaches, and in how many the weight
    # grows to its value from there.
    begin_step: int = 0
    ramp_steps: int = 0
    utterances: str = "all"  # all | pseudo: those that it is used on; pseudo: those of data.pseudo_labels
    # The teacher's encoder output as local/pseudo_label.py --soft stored it, instead of running its encoder.
    stored: bool = False
    lattice: str = "pruned"  # pruned | full
    ranges_from: str = "student"  # student | teacher: whose simple loss prunes; the other one's is not used
    form: str = "full"  # full | collapsed
    temperature: float = 1.0
    frame_shift: int = 0  # encoder frames by which the student may be later than the teacher
    weighting: str = "uniform"  # uniform | occupancy
    normalise_by: str = "nodes"  # nodes | frames; a weighted mean, as by occupancy, is the same with both
    utterances_at_once: int = 1  # lattice=full: few, because the logits of every node are large


@dataclass
class TwoPassConfig:
    """Training of the LAS (objective las), and of transducer and LAS together (objective two_pass)."""

    rnnt_weight: float = 0.5  # lambda of lambda L_transducer + (1 - lambda) L_las; objective two_pass only
    las_kd_weight: float = 0.0  # alpha of L_las = (1 - alpha) CE + alpha tau^2 KL(teacher's LAS || LAS)
    las_kd_temperature: float = 1.0
    mwer_weight: float = 0.0  # objective two_pass only: expected word errors of the first pass's n-best
    mwer_nbest: int = 4  # hypotheses of an utterance, by modified beam search


@dataclass
class PruningConfig:
    """How the share of the groups that streaming mode leaves out grows (compress/pruning.py).

    From begin_step on the groups are chosen anew every refresh_every updates, the last time at begin_step +
    num_steps; then they are fixed.
    """

    sparsity: float = 0.0  # of each layer's groups, at the end
    initial_sparsity: float = 0.0  # at begin_step; above 0: that of the masks in init.exp_dir
    begin_step: int = 0
    num_steps: int = 1
    refresh_every: int = 100


@dataclass
class Wav2Vec2Config:
    """Pretraining of the encoder without text (objective wav2vec2; arXiv:2006.11477)."""

    mask_prob: float = 0.065  # that a masked span begins at a frame; spans may overlap
    mask_length: int = 10  # encoder frames
    num_codebooks: int = 2
    num_entries: int = 320  # of each codebook
    codebook_dim: int = 128  # of all codebooks together
    projection_dim: int = 128  # in which context and target are compared
    num_distractors: int = 100  # of the same utterance's masked frames
    similarity_temperature: float = 0.1  # kappa
    gumbel_start: float = 2.0  # temperature of the quantiser
    gumbel_end: float = 0.5  # reached at the last update, geometrically
    diversity_weight: float = 0.1
    penalty_weight: float = 1.0  # of the mean square of the features that are quantised


@dataclass
class SpecAugmentConfig:
    enabled: bool = True
    begin_step: int = 0  # update from which on: fresh weights begin to emit sooner without
    num_time_masks: int = 10
    max_time_mask_frames: int = 100
    max_time_mask_fraction: float = 0.15  # of an utterance, all time masks together
    num_feature_masks: int = 2
    max_feature_mask_bins: int = 27


@dataclass
class DataConfig:
    fbank_dir: str = ""  # holds cuts_<part>.jsonl.gz
    lang_dir: str = ""  # holds bpe.model
    train_parts: List[str] = field(default_factory=lambda: ["train"])
    train_share: float = 1.0  # of the cuts of train_parts, always the same ones
    valid_part: str = "dev"
    pseudo_labels: str = ""  # folder of local/pseudo_label.py, whose utterances join the train_parts
    pseudo_share: float = 0.0  # of the audio that is trained on; 0: every utterance once an epoch
    max_duration_s: float = 200.0  # audio seconds in a batch of one rank
    max_cut_s: float = 25.0
    min_cut_s: float = 0.3
    num_buckets: int = 15
    num_workers: int = 0
    on_the_fly_feats: bool = False
    speed_perturb: bool = False  # 0.9 and 1.1 copies; needs on_the_fly_feats or fbank made with it
    musan_cuts: str = ""  # CutSet of noise to mix in, needs on_the_fly_feats
    musan_prob: float = 0.5
    musan_snr_db: List[float] = field(default_factory=lambda: [10.0, 20.0])
    # Share of the batches in training that get silence around their words and an utterance without words,
    # both on top of max_duration_s: at most half of it, or 60 s where that is more.
    silence_prob: float = 0.0
    # Share of the batches in training whose utterances are joined in pairs with a pause between,
    # where no pair gets longer than max_cut_s.
    join_prob: float = 0.0
    seed: int = 42


@dataclass
class OptimConfig:
    lr: float = 2e-3  # peak
    betas: List[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 300
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up, over max_steps
    final_lr_ratio: float = 0.02
    clip_norm: float = 5.0


@dataclass
class TrainConfig:
    max_steps: int = 1000  # optimiser updates; the run ends here
    accumulate: int = 1  # batches per update
    precision: str = "fp32"  # fp32 | bf16 | fp16; the transducer loss is always fp32
    seed: int = 42
    num_threads: int = 0  # intra-op CPU threads; 0: torch's choice
    log_every: int = 20
    valid_every: int = 200
    valid_wer_utterances: int = 24  # decoded greedily at each validation, shown in TensorBoard
    save_every: int = 500
    keep_last: int = 3  # checkpoint-N.pt kept
    keep_epochs: int = 10  # epoch-N.pt kept; averaging over M epochs needs M + 1
    average_period: int = 20  # running model average is updated every so many updates
    max_nonfinite: int = 5  # batches with a non-finite loss that are saved and skipped before giving up


@dataclass
class PhaseConfig:
    """Everything one `local/train.py` process needs."""

    recipe: str = "two_pass"
    corpus: str = "synthetic"
    scale: str = "mini"
    phase: str = "teacher"
    objective: str = "transducer"  # transducer | distill | las | two_pass | dual_mode | wav2vec2
    # Phases of the same experiment that the report sets this one against, with a paired bootstrap.
    compare_with: List[str] = field(default_factory=list)
    init: InitConfig = field(default_factory=InitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    two_pass: TwoPassConfig = field(default_factory=TwoPassConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    wav2vec2: Wav2Vec2Config = field(default_factory=Wav2Vec2Config)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load_config(path: Optional[Path], overrides: Sequence[str] = ()) -> PhaseConfig:
    """Read a phase YAML and apply `section.key=value` overrides.

    Raises UserError for a missing or malformed file, an unknown key, a wrong type or a value out of its
    choices.
    """
    tree: Dict[str, Any] = {}
    origin = str(path) if path else "defaults"
    if path is not None:
        tree = _read_yaml(Path(path))
        base = tree.pop("base", None)
        if base is not None:
            base_path = Path(path).parent / str(base)
            base_tree = _read_yaml(base_path)
            if "base" in base_tree:
                raise UserError(f"{base_path}: a base file may not name another base; put both into one file")
            # Checked on its own first, so that an error names the file that holds it.
            from_dict(base_tree, str(base_path))
            tree = _merged(base_tree, tree)
    config = from_dict(tree, origin)
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq:
            raise UserError(f"--set {item}: write it as section.key=value, e.g. --set optim.lr=1e-3")
        _assign(config, key.strip(), text)
    check_values(config, origin)
    return config


def from_dict(tree: Dict[str, Any], origin: str = "config") -> PhaseConfig:
    """Build a PhaseConfig from nested dicts. `origin` is named in errors."""
    return _build(PhaseConfig, tree, origin, "")


def to_dict(config: Any) -> Dict[str, Any]:
    """Nested dicts of plain types: fit for JSON and for a checkpoint loaded with weights_only=True."""
    return dataclasses.asdict(config)


def flat(tree: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    """{"a.b": value} of nested dicts."""
    out: Dict[str, Any] = {}
    for key, value in tree.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def _read_yaml(path: Path) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            tree = yaml.safe_load(f) or {}
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections with keys, found a {type(tree).__name__}")
    return tree


def _merged(base: Dict[str, Any], over: Dict[str, Any]) -> Dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both_dicts = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both_dicts else value
    return out


def _build(cls: type, tree: Any, origin: str, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(
            f"{origin}: {prefix.rstrip('.') or 'the file'} must be a section with keys, not {tree!r}"
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise UserError(f"{origin}: unknown key {prefix}{key}{_suggestion(str(key), hints)}")
        values[key] = _coerce(hints[key], value, origin, f"{prefix}{key}")
    return cls(**values)


def _coerce(hint: Any, value: Any, origin: str, key: str) -> Any:
    """Check `value` against a type hint; ints may stand for floats, nothing else is converted."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, origin, key + ".")
    if typing.get_origin(hint) is list:
        (item_hint,) = typing.get_args(hint)
        if not isinstance(value, list):
            raise UserError(f"{origin}: {key} must be a list, not {value!r}")
        return [_coerce(item_hint, v, origin, f"{key}[{i}]") for i, v in enumerate(value)]
    if hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string; users mean the number.
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                pass
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{origin}: {key} must be of type {hint.__name__}, not {value!r}")
    return value


def _assign(config: PhaseConfig, dotted: str, text: str) -> None:
    target, hint, names = config, PhaseConfig, dotted.split(".")
    for i, name in enumerate(names):
        hints = typing.get_type_hints(type(target)) if dataclasses.is_dataclass(target) else {}
        if name not in hints:
            raise UserError(
                f"--set {dotted}: unknown key {'.'.join(names[: i + 1])}{_suggestion(name, hints)}"
            )
        hint = hints[name]
        if i < len(names) - 1:
            target = getattr(target, name)
    try:
        value = text if hint is str else yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {dotted}={text}: cannot read the value") from None
    if typing.get_origin(hint) is list and isinstance(value, str):
        value = value.split()
    setattr(target, names[-1], _coerce(hint, value, "--set", dotted))


def _suggestion(key: str, known: Dict[str, Any]) -> str:
    close: Tuple[str, ...] = tuple(difflib.get_close_matches(key, list(known), n=1))
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(known)}" if known else ""
