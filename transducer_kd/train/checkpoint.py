"""Checkpoints: written atomically, read with weights_only=True, averaged as icefall's users expect.

A checkpoint is a dict of tensors and plain values:
    model       state dict of the trained model
    model_avg   its running average since update 0, float64 (see `update_running_average`)
    optimizer, scaler, progress (step, epoch, batch_in_epoch, ...), window (metrics since the last log line)
    config      the phase's configuration as nested dicts;  bpe_sha256: hash of the BPE model it was trained
    with
Files: `epoch-N.pt` after N passes over the data, `checkpoint-STEP.pt` in between, `best-valid.pt`.
"""

import io
import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch

from transducer_kd.log import UserError, atomic_write, one_line

State = Dict[str, torch.Tensor]


def save_checkpoint(path: Path, content: Dict[str, Any]) -> None:
    """Write `content` to `path`; a reader never sees a half-written file. UserError when the disk is full."""
    # Through memory: torch 1.13's zip writer aborts the whole process when the disk is full.
    buffer = io.BytesIO()
    torch.save(_pack(content), buffer)
    with atomic_write(path, "wb") as f:
        f.write(buffer.getbuffer())


def load_checkpoint(path: Path, device: Any = "cpu") -> Dict[str, Any]:
    """Read a checkpoint. UserError, naming the file, when it is missing or unreadable."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist{_present(path.parent)}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as e:
        raise UserError(
            f"checkpoint {path} cannot be read ({one_line(e)}); delete it and resume from an older one"
        ) from None
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{path} is not a checkpoint of this project: it has no 'model' entry")
    return _unpack(content)


# torch 1.13's weights_only reader knows no Python float, so floats are kept as their exact hexadecimal text.
_FLOAT_KEY = "__float__"


def _pack(tree: Any) -> Any:
    if isinstance(tree, float):
        return {_FLOAT_KEY: tree.hex()}
    if isinstance(tree, dict):
        return {k: _pack(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_pack(v) for v in tree]
    return tree


def _unpack(tree: Any) -> Any:
    if isinstance(tree, dict):
        if _FLOAT_KEY in tree:
            return float.fromhex(tree[_FLOAT_KEY])
        return {k: _unpack(v) for k, v in tree.items()}
    return [_unpack(v) for v in tree] if isinstance(tree, list) else tree


def _present(folder: Path) -> str:
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    names = sorted(p.name for p in folder.glob("*.pt"))
    return f"; found there: {', '.join(names)}" if names else f"; {folder} holds no checkpoint yet"


def epochs_in(exp_dir: Path) -> List[int]:
    """Numbers N of the `epoch-N.pt` in `exp_dir`, ascending."""
    return [number for number, _ in _numbered(exp_dir, "epoch")]


def find_resume_point(exp_dir: Path) -> Optional[Tuple[Path, Dict[str, Any]]]:
    """The checkpoint with the most updates, or None. Unreadable ones are named and passed over."""
    best: Optional[Tuple[Path, Dict[str, Any]]] = None
    for prefix in ("epoch", "checkpoint"):
        for _, path in reversed(_numbered(exp_dir, prefix)):
            try:
                content = load_checkpoint(path)
            except UserError as e:
                logging.warning("%s", e)
                continue
            if best is None or _position(content) > _position(best[1]):
                best = path, content
            break
    return best


def _position(content: Dict[str, Any]) -> Tuple[int, int, int]:
    progress = content["progress"]
    return progress["step"], progress["epoch"], progress["batch_in_epoch"]


def remove_old_checkpoints(exp_dir: Path, keep_last: int, keep_epochs: int) -> None:
    """Keep the newest `checkpoint-STEP.pt` and `epoch-N.pt`, so many of each; best-valid is never removed."""
    for prefix, keep in (("checkpoint", keep_last), ("epoch", keep_epochs)):
        for _, path in _numbered(exp_dir, prefix)[:-keep]:
            path.unlink()


def _numbered(exp_dir: Path, prefix: str) -> List[Tuple[int, Path]]:
    """(number, path) of the `<prefix>-<number>.pt` in `exp_dir`, ascending."""
    found = []
    for path in Path(exp_dir).glob(f"{prefix}-*.pt"):
        match = re.fullmatch(rf"{prefix}-(\d+)\.pt", path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def start_running_average(model: torch.nn.Module) -> State:
    """A float64 copy of the state dict (integer buffers as they are)."""
    return {
        k: v.detach().double() if v.is_floating_point() else v.detach().clone()
        for k, v in model.state_dict().items()
    }


@torch.no_grad()
def update_running_average(average: State, model: torch.nn.Module, step: int, period: int) -> None:
    """Take the weights after `step` updates into the running mean, in place, where `step` is a multiple of
    `period`.

    The mean after n samples, A_n = A_(n-1) (n-1)/n + theta_n / n, is written as A += (theta - A)/n with
    n = step/period + 1 (the initial weights are sample one), which loses no digits to a large product.
    """
    if step % period:
        return
    count = step // period + 1
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].add_((value.double() - average[name]) / count)
        else:
            average[name].copy_(value)


def average_of_span(start: State, end: State, start_samples: int, end_samples: int) -> State:
    """Mean of the weights seen between two running means.

    A_end n_end = A_start n_start + (sum in between), so the mean in between is
    A_end + (A_end - A_start) n_start / (n_end - n_start): the correction is small where the span is long,
    while the direct (A_end n_end - A_start n_start)/(n_end - n_start) subtracts two large numbers.
    """
    if end_samples <= start_samples:
        raise UserError(
            f"no running-average sample lies between the two epochs ({start_samples} and {end_samples} "
            "samples): use a larger --avg, or --avg 1 without --use-averaged-model"
        )
    weight = start_samples / (end_samples - start_samples)
    out = {}
    for name, value in end.items():
        out[name] = value + (value - start[name]) * weight if value.is_floating_point() else value
    return out


def average_of_states(states: List[State]) -> State:
    """Plain mean of several state dicts (integer buffers from the last)."""
    out = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            out[name] = torch.stack([s[name].double() for s in states]).mean(0)
        else:
            out[name] = last
    return out


def select_weights(
    exp_dir: Path, epoch: int, avg: int, use_averaged_model: bool
) -> Tuple[State, Dict[str, Any], str]:
    """Weights for decoding -> (state dict, the checkpoint they end at, a description for file names).

    epoch: N for epoch-N.pt, 0 for the last one, -1 for best-valid.pt.
    avg: how many epochs, ending at `epoch`; with `use_averaged_model` the mean of all weights in them (from
    the running average), otherwise the mean of the epochs' last weights.

    A mean is not taken of weights that were trained with other masks: of one epoch in which they changed the
    last weights are taken, with a warning; more epochs are a UserError, as are epochs that are not there.
    """
    exp_dir = Path(exp_dir)
    if epoch < -1:
        raise UserError(f"--epoch {epoch}: give N for epoch-N.pt, 0 for the last, or -1 for best-valid.pt")
    if epoch == -1:
        content = load_checkpoint(exp_dir / "best-valid.pt")
        return content["model"], content, "best-valid"
    present = epochs_in(exp_dir)
    if not present:
        raise UserError(f"{exp_dir} holds no epoch-N.pt{_present(exp_dir)}; train the phase first")
    epoch = epoch or present[-1]
    if avg < 1 or avg > epoch:
        raise UserError(f"--avg {avg} must be between 1 and the epoch, {epoch}")
    content = load_checkpoint(exp_dir / f"epoch-{epoch}.pt")
    name = f"epoch-{epoch}-avg-{avg}"
    if use_averaged_model:
        if avg == epoch:
            # The running mean since update 0 holds the random weights that training began with.
            if "selected_from" not in content:  # selected weights are one set
                logging.warning(
                    "%s: no epoch before the %d averaged ones; taking the last weights", exp_dir, avg
                )
            return content["model"], content, f"epoch-{epoch}"
        name += "-use-averaged-model"
        start = load_checkpoint(exp_dir / f"epoch-{epoch - avg}.pt")
        if avg == 1 and not _have_same_masks([start["model"], content["model"]]):
            logging.warning("%s: the masks changed in epoch %d; taking the last weights", exp_dir, epoch)
            return content["model"], content, f"epoch-{epoch}"
        _check_same_masks(exp_dir, [start["model"], content["model"]], epoch)
        state = average_of_span(
            start["model_avg"], content["model_avg"], _average_samples(start), _average_samples(content)
        )
        return state, content, name
    earlier = [load_checkpoint(exp_dir / f"epoch-{n}.pt")["model"] for n in range(epoch - avg + 1, epoch)]
    _check_same_masks(exp_dir, earlier + [content["model"]], epoch)
    return average_of_states(earlier + [content["model"]]) if earlier else content["model"], content, name


def _have_same_masks(states: List[State]) -> bool:
    """Whether what is not averaged, such as a supernet's masks and how often they were chosen, is equal."""
    last = states[-1]
    counted = [name for name, value in last.items() if not value.is_floating_point()]
    return all(torch.equal(state[name], last[name]) for name in counted for state in states)


def _check_same_masks(exp_dir: Path, states: List[State], epoch: int) -> None:
    """UserError where a mean would be one of weights that were trained with other masks."""
    if not _have_same_masks(states):
        raise UserError(
            f"{exp_dir}: the masks changed among the epochs up to {epoch} that are to be averaged, so their "
            "weights belong to different models; use a smaller --avg, or train on after the masks are fixed "
            "(pruning.begin_step + pruning.num_steps)"
        )


def _average_samples(content: Dict[str, Any]) -> int:
    return content["progress"]["step"] // content["config"]["train"]["average_period"] + 1
