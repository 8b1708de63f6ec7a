"""Labels without a model."""

import math

DIM = 6
RUN = {
    "teacher": {"path": "exp/teacher", "checkpoint": "epoch-2-avg-1", "sha256": "a" * 64},
    "bpe_sha256": "b" * 64, "part": "unlabelled", "cuts_sha256": "c" * 64, "method": "modified_beam_search",
    "beam_size": 4, "chunk_size": 0, "max_duration_s": 4.0, "unit_hours": 0.001, "soft": "int8", "dim": DIM,
}  # fmt: skip


def make_label(cut_id, text="turn on the light", num_tokens=5, score=-0.5, frames=20):
    confidence = math.exp(score / max(1, num_tokens))
    return {"id": cut_id, "text": text, "num_tokens": num_tokens, "score": score, "confidence": confidence,
            "frames": frames, "soft": None, "seconds": 0.25}  # fmt: skip
