"""Taking over a finished training of the same phase, instead of training it again: recipes share teachers."""

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Sequence

from transducer_kd.config import PhaseConfig, to_dict
from transducer_kd.log import UserError, read_json, write_json
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train import experiment


def take_over(
    exp_dir: Path, folders: Sequence[Path], config: PhaseConfig, bpe_sha256: str, origins: Dict[str, Any]
) -> bool:
    """Fill `exp_dir` from the first of `folders` that holds a finished training with this configuration, BPE
    model, first weights, teacher and pseudo-labels. The recipe may differ, and what may change on resume.

    False, and a line in the log for each, where none does; False where `exp_dir` has begun a training itself.
    A call that is interrupted leaves `exp_dir` without checkpoints, and the next one begins again.
    """
    exp_dir = Path(exp_dir)
    if experiment.has_checkpoints(exp_dir):
        return False
    for folder in folders:
        reason = _why_not(folder, config, bpe_sha256, origins)
        if reason:
            logging.info("not taking over %s: %s", folder, reason)
            continue
        _fill(exp_dir, folder, config)
        logging.info("took over the training in %s", folder)
        return True
    return False


def _why_not(folder: Path, config: PhaseConfig, bpe_sha256: str, origins: Dict[str, Any]) -> str:
    """What speaks against taking over `folder`; "" where nothing does."""
    missing = [name for name in ("config.json", "meta.json") if not (folder / name).is_file()]
    epochs = ckpt.epochs_in(folder)
    if missing or not epochs:
        return f"it has no {missing[0] if missing else 'epoch-N.pt'}"
    try:
        if read_json(folder / "meta.json").get("bpe_sha256") != bpe_sha256:
            return "it has another BPE model"
        recipe = read_json(folder / "config.json").get("recipe", "")
        differing = experiment.differences(folder, dataclasses.replace(config, recipe=recipe), origins)
        if differing:
            return differing[0]
        step = ckpt.load_checkpoint(folder / f"epoch-{epochs[-1]}.pt")["progress"]["step"]
    except UserError as e:
        return str(e)
    return "" if step == config.train.max_steps else f"it stands at update {step} of {config.train.max_steps}"


def _fill(exp_dir: Path, folder: Path, config: PhaseConfig) -> None:
    """Make `exp_dir` from `folder` in one move; the log files that it holds stay in it."""
    made = exp_dir.with_name(f".{exp_dir.name}.taken-over")
    shutil.rmtree(made, ignore_errors=True)  # of a killed process
    made.mkdir(parents=True)
    for path in folder.glob("*.pt"):
        _link(path, made / path.name)
    for path in folder.glob("train_log.jsonl"):
        shutil.copy2(path, made / path.name)
    if (folder / "tensorboard").is_dir():
        shutil.copytree(folder / "tensorboard", made / "tensorboard")
    write_json(made / "config.json", to_dict(config))
    meta = read_json(folder / "meta.json")
    write_json(made / "meta.json", {**meta, "reused_from": str(folder)})
    if (exp_dir / "log").is_dir():
        (exp_dir / "log").rename(made / "log")
    if exp_dir.is_dir() and not any(exp_dir.iterdir()):
        exp_dir.rmdir()
    experiment.set_aside(exp_dir)  # where anything else is in it
    made.rename(exp_dir)


def _link(source: Path, target: Path) -> None:
    """Another name for a checkpoint, which nobody changes in place; a copy where the disk knows no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
