"""The one place that names concrete classes: from a phase's configuration to the objects that run it."""

import copy
import dataclasses
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch

from transducer_kd import config as cfg
from transducer_kd.compress.pruning import Pruner, mask_image
from transducer_kd.data.datamodule import DataModule
from transducer_kd.data.pseudo_labels import read_summary
from transducer_kd.data.tokenizer import Tokenizer, check_same_tokens
from transducer_kd.decode import wer
from transducer_kd.decode.greedy import greedy_search
from transducer_kd.log import UserError, read_json
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.scripted import load_scripted
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.subsampling import subsampled_lens
from transducer_kd.models.supernet import Supernet
from transducer_kd.models.transducer import Transducer
from transducer_kd.models.wav2vec2 import Wav2Vec2
from transducer_kd.objectives.base import Objective
from transducer_kd.objectives.distill import DistillObjective
from transducer_kd.objectives.dual_mode import DualModeObjective
from transducer_kd.objectives.transducer import TransducerObjective
from transducer_kd.objectives.two_pass import LasObjective, TwoPassObjective
from transducer_kd.objectives.wav2vec2 import Wav2Vec2Objective
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train import faults
from transducer_kd.train.trainer import Validation

_SPARSITY_ROUNDING = 0.1  # of a few heads not just any share can be left out


@dataclass
class LoadedModel:
    """A trained phase, ready to decode: the model is in eval mode on the device that was asked for."""

    model: Transducer
    config: cfg.PhaseConfig
    tokenizer: Tokenizer
    checkpoint: str  # which weights: "epoch-7-avg-2-use-averaged-model"

    def in_mode(self, chunk_size: int) -> "LoadedModel":
        """One mode alone, which config.model.encoder.chunk_size then names: 0 is full context. A supernet's
        model has no masks any more: what they leave out in streaming mode is 0, for streaming_forward too.
        """
        if isinstance(self.model, Supernet):
            model = self.model.plain(chunk_size)
        elif chunk_size == self.config.model.encoder.chunk_size:
            return self
        else:
            model = copy.deepcopy(self.model)
            model.config.encoder.chunk_size = chunk_size
        return dataclasses.replace(
            self, model=model, config=dataclasses.replace(self.config, model=model.config)
        )


def build_model(config: cfg.PhaseConfig, vocab_size: int) -> Transducer:
    """The phase's transducer with fresh weights, the same for the same `train.seed`."""
    torch.manual_seed(config.train.seed)
    model_class = Transducer if config.model.pruned_groups == "none" else Supernet
    return model_class(config.model, vocab_size, with_ctc=config.loss.ctc_weight > 0)


def build_trained(config: cfg.PhaseConfig, vocab_size: int) -> Any:
    """What the phase's objective trains: build_model's transducer, as part of a Wav2Vec2 in pretraining."""
    model = build_model(config, vocab_size)
    return Wav2Vec2(model, config.wav2vec2) if config.objective == "wav2vec2" else model


def build_objective(
    config: cfg.PhaseConfig, tokenizer: Tokenizer
) -> Tuple[Objective, Dict[str, Dict[str, Any]]]:
    """What the phase trains, and where its first weights, its teacher and its pseudo-labels come from:
    {"init" | "teacher" | "labels": {"path", "checkpoint", "sha256"}}, of those that it has.

    UserError where one of them is missing or does not fit.
    """
    model, origins = build_trained(config, tokenizer.vocab_size), {}
    if config.objective in ("las", "two_pass"):
        _require(config.init.exp_dir, "init.exp_dir", "the trained phase to begin with")
    if config.pruning.initial_sparsity > 0:
        _require(
            config.init.exp_dir, "init.exp_dir", "the phase whose masks pruning.initial_sparsity goes on with"
        )
    if config.init.exp_dir:
        origins["init"] = _start_from(model, config.init, tokenizer, config.objective)
        if config.pruning.initial_sparsity > 0:
            _check_initial_sparsity(model.masks.sparsity(), config)
    teacher = None
    if config.teacher.kind != "none":
        teacher, origins["teacher"] = build_teacher(config.teacher, tokenizer)
    if config.data.pseudo_labels:
        origins["labels"] = _check_labels(config, tokenizer, origins.get("teacher"))
    else:
        _check_no_labels(config)
    objective = objective_of(model, config, teacher, tokenizer)
    if config.pruning.sparsity > 0:
        objective.pruner = Pruner(model, config.pruning)
    return objective, origins


def objective_of(
    model: Any,
    config: cfg.PhaseConfig,
    teacher: Optional[Frozen] = None,
    tokenizer: Optional[Tokenizer] = None,
) -> Objective:
    """What trains `model` as `config` says. tokenizer: for objective two_pass, which counts words."""
    augment = SpecAugment(config.spec_augment)
    if config.objective == "wav2vec2":
        return Wav2Vec2Objective(model, config.wav2vec2, config.train.max_steps)
    if config.objective == "dual_mode":
        return DualModeObjective(model, config.loss, augment, config.distill)
    if config.objective == "las":
        return LasObjective(model, augment, config.two_pass, teacher)
    if config.objective == "two_pass":

        def to_words(tokens: List[int]) -> List[str]:
            return tokenizer.decode(tokens).split()

        return TwoPassObjective(
            model, config.loss, augment, config.distill, config.two_pass, teacher, to_words
        )
    if config.objective == "distill":
        return DistillObjective(model, config.loss, augment, config.distill, teacher)
    return TransducerObjective(model, config.loss, augment)


def build_teacher(config: cfg.TeacherConfig, tokenizer: Tokenizer) -> Tuple[Frozen, Dict[str, str]]:
    """The teacher that `config` names, and where it comes from. UserError unless it has our vocabulary."""
    if config.kind == "exp_dir":
        _require(config.exp_dir, "teacher.exp_dir", "a trained phase's folder")
        lang_dir = str(tokenizer.path.parent)
        loaded = load_model(
            Path(config.exp_dir), config.epoch, config.avg, config.use_averaged_model, lang_dir=lang_dir
        )
        if config.chunk_size >= 0 or loaded.config.model.pruned_groups != "none":
            own = loaded.config.model.encoder.chunk_size
            loaded = loaded.in_mode(config.chunk_size if config.chunk_size >= 0 else own)
            logging.info(
                "the teacher hears chunks of %d frames (0: all)", loaded.config.model.encoder.chunk_size
            )
        model, checkpoint = loaded.model, loaded.checkpoint
    else:
        _require(config.torchscript, "teacher.torchscript", "a TorchScript file")
        _require(config.tokens, "teacher.tokens", "the tokens.txt that it was trained with")
        check_same_tokens(tokenizer.path.parent / "tokens.txt", Path(config.tokens))
        model, checkpoint = load_scripted(Path(config.torchscript)), "torchscript"
    path = config.exp_dir if config.kind == "exp_dir" else config.torchscript
    if model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the teacher {path} has {model.vocab_size} classes and the "
            f"student {tokenizer.vocab_size}; they need the same BPE model"
        )
    return Frozen(model), origin_of(path, checkpoint, model.state_dict())


def _check_no_labels(config: cfg.PhaseConfig) -> None:
    """UserError where something is to be done with pseudo-labels and there are none."""
    asked = {
        f"data.pseudo_share={config.data.pseudo_share}": config.data.pseudo_share > 0,
        f"loss.pseudo_weight={config.loss.pseudo_weight}": config.loss.pseudo_weight != 1,
        "distill.utterances=pseudo": config.distill.utterances == "pseudo",
    }
    settings = " and ".join(name for name, is_set in asked.items() if is_set)
    if settings:
        raise UserError(
            f"{settings}, but there are no pseudo-labels: pass --set data.pseudo_labels=... (a folder of "
            "local/pseudo_label.py)"
        )


def _check_labels(
    config: cfg.PhaseConfig, tokenizer: Tokenizer, teacher: Optional[Dict[str, str]]
) -> Dict[str, str]:
    """Where the pseudo-labels come from; teacher: the phase's own origin of one. UserError unless they are
    finished and fit."""
    folder = Path(config.data.pseudo_labels)
    summary, run = read_summary(folder), read_json(folder / "run.json")
    if run["bpe_sha256"] != tokenizer.sha256:
        raise UserError(
            f"data.pseudo_labels={folder} was made with another BPE model than {tokenizer.path}; use the "
            "lang_dir that its teacher was trained with, or label again"
        )
    if config.distill.stored and not summary["soft"]:
        raise UserError(
            f"distill.stored=true, but data.pseudo_labels={folder} has no stored teacher; label with "
            "local/pseudo_label.py --soft int8, or set distill.stored=false"
        )
    by = summary["teacher"]
    if config.distill.stored and by["sha256"] != teacher["sha256"]:
        raise UserError(
            f"distill.stored=true, but data.pseudo_labels={folder} is by {by['checkpoint']} of {by['path']} "
            f"and the teacher is {teacher['checkpoint']} of {teacher['path']}, whose weights differ; label "
            "again with local/pseudo_label.py (run.sh: the stage that labels), use the same teacher, or set "
            "distill.stored=false to run it"
        )
    return {"path": str(folder), "checkpoint": by["checkpoint"], "sha256": summary["sha256"]}


def _require(value: str, key: str, what: str) -> None:
    if not value:
        raise UserError(f"{key} is not set; pass --set {key}=... ({what})")


def _check_initial_sparsity(sparsity: float, config: cfg.PhaseConfig) -> None:
    """sparsity: share of the weights that the first masks leave out."""
    if abs(sparsity - config.pruning.initial_sparsity) > _SPARSITY_ROUNDING:
        raise UserError(
            f"pruning.initial_sparsity={config.pruning.initial_sparsity}, but the masks of init.exp_dir="
            f"{config.init.exp_dir} leave {sparsity:.2f} of the weights out, and would jump at their first "
            "choice; set it to what they have, which is 0 where that phase has no masks, or of other groups"
        )


def _start_from(model: Any, init: cfg.InitConfig, tokenizer: Tokenizer, objective: str) -> Dict[str, Any]:
    """Load an earlier phase's weights into `model`; only a whole CTC head, a whole LAS and all masks may be
    new, or be left behind, and everything but the encoder where the earlier phase had no text."""
    state, content, checkpoint = ckpt.select_weights(
        Path(init.exp_dir), init.epoch, init.avg, init.use_averaged_model
    )
    _check_bpe(init.exp_dir, content, tokenizer)
    reference, there = model.state_dict(), cfg.from_dict(content["config"], init.exp_dir)
    there_parts = {_part(k) for k in state}
    if there.model.pruned_groups != model.config.pruned_groups:
        state = {k: v for k, v in state.items() if _part(k) != "masks"}  # of other groups
    own = {_part(k) for k in state} & {_part(k) for k in reference}
    replaceable = {"las", "ctc_output", "masks"}
    if there.objective == "wav2vec2":
        if objective == "las":
            raise UserError(
                f"init.exp_dir={init.exp_dir} was pretrained without text, and objective=las trains the LAS "
                "alone: prediction network and joiner would stay untrained; begin with a trained transducer"
            )
        replaceable = {_part(k) for k in (*state, *reference)} - {"encoder"}
    for key in sorted(state.keys() | reference.keys()):
        found, wanted = (tuple(s[key].shape) if key in s else "nothing" for s in (state, reference))
        if found != wanted and (_part(key) in own or _part(key) not in replaceable):
            raise UserError(
                f"init.exp_dir={init.exp_dir} does not fit the model of this phase: {key} is {found} there "
                f"and {wanted} here; give both phases the same model section"
            )
    heads = there.model.encoder.num_heads
    if heads != model.config.encoder.num_heads:  # the shapes do not tell
        raise UserError(
            f"init.exp_dir={init.exp_dir} has model.encoder.num_heads={heads} and this phase has "
            f"{model.config.encoder.num_heads}; give both phases the same model section"
        )
    state = {k: v.to(reference[k].dtype) for k, v in state.items() if k in reference}
    model.load_state_dict({**reference, **state})
    fresh = sorted({_part(k) for k in reference} - {_part(k) for k in state})
    left = sorted(there_parts - {_part(k) for k in reference})
    logging.info(
        "begun from %s of %s; fresh: %s; left behind: %s",
        checkpoint, init.exp_dir, " ".join(fresh) or "nothing", " ".join(left) or "nothing",
    )  # fmt: skip
    origin: Dict[str, Any] = origin_of(init.exp_dir, checkpoint, state)
    if "selected_from" in content:  # by local/compress.py: they are still those of another phase
        origin["selected_from"] = content["selected_from"]
    return origin


def _part(key: str) -> str:
    return key.split(".")[0]


def origin_of(path: str, checkpoint: str, state: Dict[str, torch.Tensor]) -> Dict[str, str]:
    """Where weights come from: the sha256 is of the names and values of the state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return {"path": path, "checkpoint": checkpoint, "sha256": digest.hexdigest()}


def build_data(
    config: cfg.DataConfig,
    tokenizer: Tokenizer,
    world_size: int = 1,
    rank: int = 0,
    soft_targets: bool = False,
    needs_text: bool = True,
) -> DataModule:
    """Batches of the phase; utterances the encoder makes shorter than their tokens are dropped there.
    soft_targets: with the stored teacher of pseudo-labelled ones (distill.stored). needs_text: false for
    pretraining, which has no use for it."""
    return DataModule(config, tokenizer, subsampled_lens, world_size, rank, soft_targets, needs_text)


def build_tokenizer(config: cfg.DataConfig) -> Tokenizer:
    """The BPE model of `data.lang_dir`."""
    if not config.lang_dir:
        raise UserError("data.lang_dir is not set; pass --set data.lang_dir=DIR (the folder with bpe.model)")
    return Tokenizer(config.lang_dir)


class Validator:
    """Mean losses over the validation part, and each mode's WER of a few utterances decoded greedily."""

    def __init__(self, data: DataModule, tokenizer: Tokenizer, num_utterances: int, device: torch.device):
        self.data, self.tokenizer = data, tokenizer
        self.num_utterances, self.device = num_utterances, device

    def __call__(self, objective: Objective, step: int) -> Validation:
        """Run on rank 0, without gradients, the objective in eval mode."""
        sums: Dict[str, float] = {}
        texts: Dict[str, List[Tuple[str, str, str]]] = {name: [] for name, _ in objective.wer_chunk_sizes}
        frames, images = 0.0, {}
        for batch in self.data.valid_batches():
            with faults.naming_out_of_memory([batch], step, "validation with "):
                batch = batch.to(self.device)
                output = objective.evaluate(batch, step)
            frames += float(output.num_frames)
            for name, value in output.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if not images:
                images = objective.images(batch, step)
            if objective.trains_first_pass:
                for name, chunk_size in objective.wer_chunk_sizes:
                    if len(texts[name]) < self.num_utterances:
                        texts[name] += self._decode(objective.model, batch, chunk_size)
        if not frames:
            raise UserError(
                "the validation part (data.valid_part) has no usable cut; see the counts in the log"
            )
        metrics = {name: value / frames for name, value in sums.items()}
        metrics.update(objective.of_validation())
        for name, found in texts.items():
            found = texts[name] = found[: self.num_utterances]
            if found:
                metrics[name] = wer.word_error_rate([(cut, r.split(), h.split()) for cut, r, h in found])
        if objective.pruner is not None:
            images["masks"] = mask_image(objective.model.masks)
        return Validation(metrics, texts["wer"], images, objective.histograms())

    def _decode(self, model: Transducer, batch: Any, chunk_size: Optional[int]) -> List[Tuple[str, str, str]]:
        encoder_out, encoder_out_lens = model.encode(batch.features, batch.feature_lens, chunk_size)
        found = greedy_search(model, encoder_out, encoder_out_lens)
        hyps = [self.tokenizer.decode(h.tokens) for h in found]
        return list(zip(batch.cut_ids, batch.texts, hyps))


def load_model(
    exp_dir: Path,
    epoch: int = 0,
    avg: int = 1,
    use_averaged_model: bool = False,
    device: str = "cpu",
    lang_dir: str = "",
) -> LoadedModel:
    """Load a trained phase. epoch 0: the last; -1: best-valid. `lang_dir` replaces the one it was trained
    with, where that has moved. UserError names what is missing or does not fit.
    """
    exp_dir = Path(exp_dir)
    if not exp_dir.is_dir():
        raise UserError(f"there is no experiment folder {exp_dir}; train the phase first (run.sh)")
    state, content, name = ckpt.select_weights(exp_dir, epoch, avg, use_averaged_model)
    config = cfg.from_dict(content["config"], str(exp_dir))
    if config.objective == "wav2vec2":
        raise UserError(
            f"{exp_dir} was pretrained without text and cannot recognise anything: begin a phase with it "
            "(--set init.exp_dir=...), and use that"
        )
    written = exp_dir / "config.json"
    if written.is_file():  # of a training that was taken over, the checkpoints name the recipe that ran it
        config.recipe = read_json(written).get("recipe", config.recipe)
    config.data.lang_dir = lang_dir or config.data.lang_dir
    tokenizer = build_tokenizer(config.data)
    _check_bpe(exp_dir, content, tokenizer)
    model = build_model(config, tokenizer.vocab_size)
    reference = model.state_dict()
    model.load_state_dict({k: v.to(reference[k].dtype) for k, v in state.items()})
    logging.info("loaded %s of %s (%d parameters deployed)", name, exp_dir, model.deployed_parameters())
    return LoadedModel(model.eval().to(device), config, tokenizer, name)


def _check_bpe(exp_dir: Any, content: Dict[str, Any], tokenizer: Tokenizer) -> None:
    if tokenizer.sha256 != content["bpe_sha256"]:
        raise UserError(
            f"{exp_dir} was trained with another BPE model than {tokenizer.path} (sha256 "
            f"{content['bpe_sha256'][:12]}, found {tokenizer.sha256[:12]}); use the lang_dir it was trained "
            "with, or train again"
        )
