"""Saying what went wrong with a batch: which cuts have a bad loss, which batch did not fit into memory.

N utterances, T feature frames, T' encoder frames, U tokens.
"""

import contextlib
from typing import Any, Iterator, List

import torch

from transducer_kd.log import UserError
from transducer_kd.objectives.base import LossOutput


def nonfinite_cuts(batch: Any, output: LossOutput) -> str:
    """The cuts whose loss is not finite, each with its T' and U."""
    bad = (~torch.isfinite(output.losses)).tolist()
    rows = zip(batch.cut_ids, output.encoder_out_lens.tolist(), batch.y_lens.tolist())
    return ", ".join(f"{cut} (T'={t}, U={u})" for (cut, t, u), is_bad in zip(rows, bad) if is_bad)


@contextlib.contextmanager
def naming_out_of_memory(batches: List[Any], step: int, what: str = "") -> Iterator[None]:
    """Turn CUDA's out-of-memory errors, wherever they come up, into a UserError that names the batch."""
    try:
        yield
    except RuntimeError as e:
        if "out of memory" not in str(e) and "ALLOC_FAILED" not in str(e):
            raise
        worst = max(batches, key=lambda b: len(b.cut_ids) * int(b.feature_lens.max()))
        cuts = ", ".join(worst.cut_ids[:8]) + (" ..." if len(worst.cut_ids) > 8 else "")
        raise UserError(
            f"the GPU ran out of memory at update {step}, {what}{len(worst.cut_ids)} utterances of up to "
            f"T={int(worst.feature_lens.max())} frames and U={int(worst.y_lens.max())} tokens ({cuts}); "
            "lower data.max_duration_s or data.max_cut_s, and raise train.accumulate to keep the batch size"
        ) from e
