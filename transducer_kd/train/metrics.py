"""Sums of metrics between two log lines, and the append-only training log that reports read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List

import torch

from transducer_kd.log import atomic_write, read_jsonl


@dataclass
class MetricsWindow:
    """Sums since the last log line; `means` divides them by frames once.

    It is part of a checkpoint, so that a run resumed in the middle of a window logs what the uninterrupted
    one did.
    """

    sums: Dict[str, float] = field(default_factory=dict)
    num_frames: float = 0.0
    updates: int = 0
    grad_norm_sum: float = 0.0

    def add(self, sums: Dict[str, float], num_frames: float) -> None:
        """Take in one batch's sums (all ranks together)."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.num_frames += num_frames

    def means(self) -> Dict[str, float]:
        """Every sum per encoder frame, and the mean gradient norm."""
        out = {name: value / max(self.num_frames, 1.0) for name, value in self.sums.items()}
        out["grad_norm"] = self.grad_norm_sum / max(self.updates, 1)
        return out


class TrainLog:
    """`train_log.jsonl`: one JSON object a line, the machine-readable twin of the log lines.

    On resume the lines beyond the checkpoint's update are cut off: the run writes them again.
    """

    def __init__(self, path: Path, resume_step: int):
        self.path = Path(path)
        kept = (
            [line for line in read_train_log(self.path) if line["step"] <= resume_step] if resume_step else []
        )
        with atomic_write(self.path) as f:
            f.writelines(json.dumps(line) + "\n" for line in kept)

    def append(self, line: Dict[str, Any]) -> None:
        """Append one object; it needs `kind` and `step`."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


def read_train_log(path: Path) -> List[Dict[str, Any]]:
    """Lines of a training log; a last line cut short by a killed process is left out."""
    return read_jsonl(Path(path), ("kind", "step"))


def add_counts(writer: Any, name: str, counts: torch.Tensor, step: int) -> None:
    """Show counts (n,) of the numbers 0 to n - 1 as a histogram, a bar for each number, in TensorBoard.

    SummaryWriter.add_histogram would count itself; that of torch 1.13 fails with newer versions of numpy.
    """
    values = torch.arange(len(counts), dtype=torch.float64)
    weights = counts.double().cpu()
    writer.add_histogram_raw(
        name, 0.0, float(len(counts)), float(weights.sum()), float((weights * values).sum()),
        float((weights * values**2).sum()), (values + 0.5).tolist(), weights.tolist(), step,
    )  # fmt: skip
