"""How much memory a process, or a piece of it, needed at most."""

import logging
import resource
from pathlib import Path
from typing import Any, Callable

import torch


def peak_memory(device: torch.device) -> str:
    """What this process needed at most so far, of the machine's memory and of the GPU's."""
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    if device.type == "cuda":
        text += f", GPU {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return text


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that step() needs beyond those in use before it: on a GPU of tensors, on a CPU of the resident
    set (Linux). There the environment should have MALLOC_MMAP_THRESHOLD_=65536 from the start of the process:
    what is freed then goes back to the system, so that tensors are counted and not what malloc keeps.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logging.info("the peak of the resident set cannot be reset: it counts from the start of the process")
    before = kilobytes("VmRSS")
    step()
    return max(0, kilobytes("VmHWM") - before)


def kilobytes(key: str, path: str = "/proc/self/status") -> int:
    """The value of a line `key:  123 kB`, in bytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
