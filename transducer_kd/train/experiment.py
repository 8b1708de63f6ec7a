"""The experiment folder: what it keeps so that a result can be traced and a run resumed.

config.json   the resolved configuration      meta.json   commit, versions, command, parameter counts
"""

import importlib.metadata
import logging
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from transducer_kd.config import PhaseConfig, flat, from_dict, to_dict
from transducer_kd.log import UserError, check_disk_space, read_json, write_json
from transducer_kd.train import ddp

_CODE = Path(__file__).resolve().parent

# Settings that may change between a run and its continuation: they say where and how often, not what is
# computed.
_MAY_CHANGE = {
    "train.log_every", "train.valid_every", "train.valid_wer_utterances", "train.save_every",
    "train.keep_last", "train.keep_epochs", "train.num_threads", "train.max_nonfinite", "data.num_workers",
    "data.fbank_dir", "data.lang_dir",
    # Whose weights and labels these are is known by their hash.
    "init.exp_dir", "teacher.exp_dir", "teacher.torchscript", "teacher.tokens", "data.pseudo_labels",
    "compare_with",
}  # fmt: skip


_LIBRARIES = ("torch", "k2", "fast_rnnt", "lhotse", "kaldifeat", "sentencepiece", "kaldialign", "numpy")


def set_aside(exp_dir: Path) -> None:
    """Move an earlier run to `<exp_dir>.old-<time>`; nothing is deleted."""
    exp_dir = Path(exp_dir)
    if exp_dir.exists():
        kept = exp_dir.with_name(f"{exp_dir.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        exp_dir.rename(kept)
        logging.info("moved the earlier run to %s", kept)


def prepare_exp_dir(
    exp_dir: Path, config: PhaseConfig, num_parameters: int, origins: Optional[Dict[str, Any]] = None
) -> None:
    """Create `exp_dir`, or check that what it holds was made with the same configuration, first weights and
    teacher (`origins`, which hold their hashes).

    Raises UserError that lists what differs, where its weights are of no training, or when the disk cannot
    hold the checkpoints to come.
    """
    exp_dir = Path(exp_dir)
    if has_checkpoints(exp_dir):
        if not (exp_dir / "config.json").exists():
            raise UserError(
                f"{exp_dir} holds weights and no config.json, so it is no training that could go on; where "
                "local/compress.py made it, pass it as --set init.exp_dir=... and name another --exp-dir"
            )
        differing = differences(exp_dir, config, origins)
        if differing:
            raise UserError(
                f"{exp_dir} holds a run with another configuration ({', '.join(differing)}); resume with the "
                "same one, use another --exp-dir, or start again with --restart (run.sh: --force), the old "
                "run is kept"
            )
    # Weights and Adam's two moments in float32, the running average in float64: 20 bytes a parameter.
    num_files = config.train.keep_last + config.train.keep_epochs + 2
    # Those that are there already need no more room, but a new one is written beside the old.
    missing = max(1, num_files - len(list(exp_dir.glob("*.pt"))))
    check_disk_space(exp_dir, 20.0 * num_parameters * missing, f"training with {num_files} checkpoints")
    exp_dir.mkdir(parents=True, exist_ok=True)
    write_json(exp_dir / "config.json", to_dict(config))


def has_checkpoints(exp_dir: Path) -> bool:
    """Whether `exp_dir` holds a training that can be resumed."""
    return any(any(exp_dir.glob(f"{name}-*.pt")) for name in ("epoch", "checkpoint"))


def differences(exp_dir: Path, config: PhaseConfig, origins: Optional[Dict[str, Any]]) -> List[str]:
    """What the run in `exp_dir` was made with and `config` and `origins` say otherwise, as "key: old -> new";
    without the settings that may change."""
    path, meta, mend = exp_dir / "config.json", exp_dir / "meta.json", "start again with --restart"
    # Through the dataclasses: a setting that did not exist then had what is its default now.
    a, b = flat(to_dict(from_dict(read_json(path, mend), str(path)))), flat(to_dict(config))
    if meta.exists():
        a.update(_hashes(read_json(meta, mend).get("origins")))
        b.update(_hashes(origins))
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and k not in _MAY_CHANGE]
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys]


def _hashes(origins: Optional[Dict[str, Any]]) -> Dict[str, str]:
    return {
        "pseudo-labels" if name == "labels" else f"weights of {name}": origin["sha256"][:12]
        for name, origin in (origins or {}).items()
    }


def write_meta(exp_dir: Path, extra: Dict[str, Any]) -> None:
    """Write meta.json: where these weights come from. Where they were taken over from is not forgotten."""
    path = Path(exp_dir) / "meta.json"
    earlier = read_json(path) if path.exists() else {}
    kept = {key: earlier[key] for key in ("reused_from",) if key in earlier}
    meta = {
        "commit": git_commit(),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "world_size": ddp.world_size(),
        "machine": platform.machine(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    write_json(path, {**meta, **extra, **kept})


def _version(name: str) -> Optional[str]:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path = _CODE) -> str:
    """Commit of the code that `folder` is part of, "-dirty" where tracked files differ, or "unknown".

    Text is no code: the reports write their results into the tracked README.md and RESULTS.md.
    """
    git = ["git", "-C", str(folder)]
    commit = ["describe", "--always", "--exclude", "*", "--abbrev=12"]
    try:
        name = subprocess.run([*git, *commit], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)*.md"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed.returncode else name
