"""A phase written into a model folder: its ONNX files in float32, tokens, weights, and model.json.

An export takes minutes, and nobody knows that it is any good until its gate is passed. So it is written
beside the folder that it is for (`new_beside`), and takes its place when all is done (`put_in_place`), by two
renames: a kill between them leaves both folders whole.

Shapes: none; see graphs.py.
"""

import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from safetensors.torch import save as safetensors_bytes

from transducer_kd.export import graphs
from transducer_kd.export.folder import PARTS, PRECISIONS, SCRATCH, ModelFolder, describe, file_name
from transducer_kd.export.onnx_files import Part, parts_of, write_part
from transducer_kd.log import UserError, atomic_write
from transducer_kd.models.transducer import Transducer

TOKEN_FILES = ("tokens.txt", "bpe.model")
_WRITTEN = {"README.md", "model.json", "gate.json", "bench.json", "model.safetensors", *TOKEN_FILES}
_WRITTEN |= {file_name(part, precision) for part in PARTS for precision in PRECISIONS}
_TRAINING_ONLY = ("simple_am_proj.", "simple_lm_proj.", "ctc_output.")


def write_folder(
    path: Path,
    model: Transducer,
    offline_model: Transducer,
    weights: Dict[str, torch.Tensor],
    lang_dir: Path,
    about: Dict[str, Any],
    rescore: Optional[Dict[str, Any]] = None,
) -> Tuple[ModelFolder, List[Part]]:
    """Export into the folder `path`, which is made where it is not there, and should hold nothing.

    model: as it streams, or an offline one; offline_model: as it hears whole utterances (see parts_of).
    weights: the phase's state dict, of which those that only training uses are left out. about: where it is
    from (recipe, corpus, scale, phase, checkpoint, commit, command). rescore: how the second pass joins.
    UserError where lang_dir lacks the tokens, or the model cannot be exported.
    """
    parts = parts_of(model, offline_model)
    names = []
    for part in parts:
        names.append(file_name(part.name, "float"))
        write_part(part, path / names[-1])
    for name in TOKEN_FILES:
        _copy(Path(lang_dir) / name, path / name)
    kept = {k: v.contiguous() for k, v in weights.items() if not k.startswith(_TRAINING_ONLY)}
    with atomic_write(path / "model.safetensors", "wb") as f:
        f.write(safetensors_bytes(kept))
    encoder = model.encoder.cfg
    sizes = {
        "chunk_size": encoder.chunk_size,
        "left_context": encoder.left_context,
        "encoder_dim": encoder.encoder_dim,
        "num_layers": encoder.num_layers,
        "cache_dim": graphs.cache_dim(model.encoder),
        "conv_frames": encoder.cnn_module_kernel // 2,
        "context_size": model.decoder.context_size,
        "joiner_dim": model.config.joiner_dim,
        "vocab_size": model.vocab_size,
        "params_first_pass": model.first_pass_parameters(),
        "params_deployed": model.deployed_parameters(),
    }
    described = {**about, "torch": torch.__version__, **sizes, "rescore": rescore}
    return describe(path, described, [*names, *TOKEN_FILES, "model.safetensors"]), parts


def check_target(path: Path) -> None:
    """UserError where `path` is a file, or a folder of something else, which an export is not to move."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    if path.is_dir() and not (path / "model.json").exists():
        for name in sorted(file.name for file in path.iterdir()):
            if name == "README.md" or not _is_of_export(name):
                raise UserError(f"{path} is no model folder and has a {name}; name a folder of its own")


def new_beside(path: Path) -> Path:
    """An empty folder to write the next export for `path` into. UserError as check_target.

    What an export that was killed has left beside `path` goes, but an old one that it had only moved aside
    comes back.
    """
    path = path.resolve()
    new, old = _hidden(path, "new"), _hidden(path, "old")
    if old.exists():
        if path.exists():
            _retire(old, path)
        else:
            old.rename(path)
    check_target(path)
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    return new


def put_in_place(new: Path, path: Path) -> None:
    """Let the export in `new`, a folder of new_beside(path), take the place of the one at `path`, of which
    only files that no export writes stay. What set_aside has kept goes.
    """
    path = path.resolve()
    old, failed = _hidden(path, "old"), failed_beside(path)
    if path.exists():
        path.rename(old)
    new.rename(path)
    if old.exists():
        _retire(old, path)
    if failed.exists():
        shutil.rmtree(failed)


def set_aside(new: Path, path: Path) -> Path:
    """Keep the export in `new`, which is not good enough for `path`, beside it -> where it is. It takes the
    place of one that was set aside earlier.
    """
    failed = failed_beside(path.resolve())
    if failed.exists():
        shutil.rmtree(failed)
    return new.rename(failed)


def failed_beside(path: Path) -> Path:
    """Where an export for `path` is that has failed its gate."""
    return path.with_name(f"{path.name}.failed")


def _hidden(path: Path, what: str) -> Path:
    """Beside `path`, because nothing can be renamed from one file system to another."""
    return path.with_name(f".{path.name}.{what}")


def _retire(old: Path, path: Path) -> None:
    """Delete an export whose place another one has taken. What somebody else put there goes on to that."""
    for file in old.iterdir():
        if not _is_of_export(file.name):
            file.rename(path / file.name)
    shutil.rmtree(old)


def _is_of_export(name: str) -> bool:
    """Whether that is what a file of an export is called, finished or not."""
    return name in _WRITTEN or name.startswith(SCRATCH) or (name.startswith(".") and name.endswith(".tmp"))


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(
            f"{source} is missing: a device needs it to turn tokens into words; run stage 1 again"
        )
    with atomic_write(target, "wb") as f:
        f.write(source.read_bytes())
