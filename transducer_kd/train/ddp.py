"""Processes of one training run, as torchrun starts them; everything is a no-op in a single process.

Gradients: DistributedDataParallel averages them over ranks, while the trainer wants sum(loss) / sum(frames).
So every rank backpropagates its own sum, and the averaged gradient is multiplied by world_size / (frames of
all ranks): then a gradient is the same however a batch is spread over ranks. All ranks must see the same
number of batches, because every update waits for all of them; the sampler of `data/` deals them out evenly.
"""

import contextlib
import datetime
import os
from dataclasses import dataclass
from typing import Any, ContextManager, Dict, List, Optional

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from transducer_kd.log import UserError

# Who waits this long for another rank is waiting for a dead process. Long, because rank 0 validates alone.
_TIMEOUT = datetime.timedelta(minutes=30)
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    rank: int
    world_size: int
    device: torch.device


def setup(device: str = "auto") -> Processes:
    """Join the process group that torchrun's environment describes -> who and where this process is.

    device: auto (GPU number LOCAL_RANK where there are GPUs, else the CPU), cpu, cuda or cuda:N.
    NCCL joins GPUs, gloo CPUs. UserError for half an environment, a GPU that is not there, or no meeting.
    """
    place = _read_environment()
    if place is None:
        return Processes(0, 1, _choose_device(device, 0, 1))
    chosen = _choose_device(device, place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"])
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"process {place['RANK']} of {place['WORLD_SIZE']} cannot meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({e}); on one machine start them with "
            "torchrun --standalone, on several give all of them the same --rdzv_endpoint"
        ) from e
    return Processes(dist.get_rank(), dist.get_world_size(), chosen)


def _read_environment() -> Optional[Dict[str, int]]:
    """torchrun's numbers for this process, or None when it was started alone."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    missing = [n for n in (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        given = ", ".join(n for n in _NUMBERS if n in os.environ)
        raise UserError(f"{given} set but not {', '.join(missing)}: start several processes with torchrun")
    place = {}
    for name in (*_NUMBERS, "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "1")
        if not text.isdigit():
            raise UserError(f"{name}={text!r} is not a number: start several processes with torchrun")
        place[name] = int(text)
    if place["RANK"] >= place["WORLD_SIZE"]:
        raise UserError(f"RANK={place['RANK']} must be below WORLD_SIZE={place['WORLD_SIZE']}")
    return place


def _choose_device(device: str, local_rank: int, processes_here: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    kind, _, index_text = device.partition(":")
    if kind != "cuda" or (index_text and not index_text.isdigit()):
        raise UserError(f"--device {device}: use auto, cpu, cuda or cuda:N")
    if index_text and processes_here > 1:
        raise UserError(f"--device {device} names one GPU for {processes_here} processes; use --device cuda")
    index = int(index_text) if index_text else local_rank
    if index >= count:
        raise UserError(
            f"--device {device}: process {local_rank} needs GPU {index}, but {count} are usable here"
        )
    return torch.device("cuda", index)


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if is_running():
        dist.destroy_process_group()


def is_running() -> bool:
    """True when this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process; 0 when it is alone."""
    return dist.get_rank() if is_running() else 0


def world_size() -> int:
    """Number of processes; 1 when alone."""
    return dist.get_world_size() if is_running() else 1


def is_main() -> bool:
    """True in the one process that logs, validates and saves."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if is_running():
        dist.barrier()


def all_reduce_sum(values: List[float]) -> List[float]:
    """Element-wise sum over processes, in float64."""
    if world_size() == 1:
        return values
    # NCCL only moves tensors that are on a GPU.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with synchronised gradients and rank 0's weights; itself when this process is alone."""
    if world_size() == 1:
        return module
    # Gloo cannot send bools. They are masks, which every process chooses alike.
    masks = [name for name, buffer in module.named_buffers() if buffer.dtype == torch.bool]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, masks)
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def no_sync(module: nn.Module) -> ContextManager[Any]:
    """Context in which backward does not exchange gradients: all but the last of accumulated batches."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()
