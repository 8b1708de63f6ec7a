"""A phase written into a model folder: its ONNX files in float32, tokens, weights, and model.json.

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
    """Export into the folder `path`, which is made where it is not there. What an earlier export left there
    goes.

    model: as it streams, or an offline one; offline_model: as it hears whole utterances (see parts_of).
    weights: the phase's state dict, of which those that only training uses are left out. about: where it is
    from (recipe, corpus, scale, phase, checkpoint, commit, command). rescore: how the second pass joins.
    UserError where lang_dir lacks the tokens, or the model cannot be exported.
    """
    parts = parts_of(model, offline_model)
    check_target(path)
    _clear(path)
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
    """UserError where an export into this folder would write over a README.md that is of no export."""
    if (path / "README.md").exists() and not (path / "model.json").exists():
        raise UserError(f"{path} is no model folder and has a README.md; name a folder of its own")


def _clear(path: Path) -> None:
    """Take away what an export leaves, finished or not: first what says that this is a model."""
    names = ["README.md", "model.json", "gate.json", "bench.json"]
    names += [file_name(part, precision) for part in PARTS for precision in PRECISIONS]
    for name in names:
        (path / name).unlink(missing_ok=True)
    for scratch in path.glob(f"{SCRATCH}*"):
        shutil.rmtree(scratch)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(
            f"{source} is missing: a device needs it to turn tokens into words; run stage 1 again"
        )
    with atomic_write(target, "wb") as f:
        f.write(source.read_bytes())
