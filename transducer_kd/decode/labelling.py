"""Labelling work units: the teacher's best hypothesis of every cut and, where asked for, its encoder output.
What local/pseudo_label.py does once its options are read; data/pseudo_labels.py has the files.

Shapes: N batch, T feature frames, T' encoder frames, D encoder_dim.
"""

import math
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch

from transducer_kd.data import pseudo_labels
from transducer_kd.data.datamodule import load_cuts
from transducer_kd.data.dataset import CutDataset, cut_frames
from transducer_kd.data.features import FeatureExtractor
from transducer_kd.data.pseudo_labels import Label
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.log import UserError, check_disk_space, progress
from transducer_kd.models.subsampling import subsampled_lens


class Labeller:
    """A teacher, and how it labels.

    loaded: build.LoadedModel.  chunk_size: encoder frames; 0: full context.  soft: one of SOFT_TYPES.
    """

    def __init__(self, loaded: Any, chunk_size: int, beam_size: int = 4, soft: str = "none"):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.chunk_size, self.beam_size, self.soft = chunk_size, beam_size, soft
        self.dim = loaded.config.model.encoder.encoder_dim
        self.device = next(loaded.model.parameters()).device
        self.on_the_fly_feats = loaded.config.data.on_the_fly_feats
        extractor = FeatureExtractor() if self.on_the_fly_feats else None
        self.dataset = CutDataset(loaded.tokenizer, extractor)

    def settings(self) -> Dict[str, Any]:
        """What labels depend on besides the weights and the data, for run.json."""
        return {
            "bpe_sha256": self.tokenizer.sha256,
            "method": "modified_beam_search",
            "beam_size": self.beam_size,
            "chunk_size": self.chunk_size,
            "soft": self.soft,
            "dim": self.dim,
        }

    def load_parts(self, fbank_dir: Path, parts: Sequence[str]) -> List[Any]:
        """The cuts of the parts that are to be labelled; they need no transcript. UserError for one that is
        no utterance, is in two parts, or has no features where they are not computed on the fly.
        """
        found = {}
        for part, cut in ((name, cut) for name in parts for cut in load_cuts(fbank_dir, name)):
            if cut.id in found:
                raise UserError(f"part {part}: cut {cut.id} was there before; leave out what holds it twice")
            found[cut.id] = cut
            if len(cut.supervisions) > 1:
                raise UserError(
                    f"part {part}: cut {cut.id} has {len(cut.supervisions)} supervisions, 1 is needed; "
                    "local/compute_fbank.py cuts recordings into utterances"
                )
            if not cut.has_features and not self.on_the_fly_feats:
                raise UserError(
                    f"part {part}: cut {cut.id} has no features; run local/compute_fbank.py without "
                    "--on-the-fly-feats"
                )
        return list(found.values())

    def label_units(self, folder: Path, units: Sequence[Any], mine: Sequence[int]) -> None:
        """Label those of `units` whose numbers are in `mine` and that nobody has done when their turn comes.

        UserError when the disk cannot hold the soft targets, for features that cannot be read, or a score
        that is not finite.
        """
        todo = [k for k in mine if not pseudo_labels.is_done(folder, k)]
        frames = sum(_num_encoder_frames(cut) for k in todo for cuts in units[k] for cut in cuts)
        needed = frames * pseudo_labels.soft_row_bytes(self.dim, self.soft)
        check_disk_space(folder, needed, "storing the teacher's encoder output")
        for k in progress(todo, total=len(todo), desc="units labelled"):
            if pseudo_labels.is_done(folder, k):  # by a job whose shard overlaps ours
                continue
            labels, rows = zip(*(pair for cuts in units[k] for pair in self._label(cuts)))
            offset = 0
            for label, own in zip(labels, rows):
                label["soft"] = [offset, label["frames"]] if self.soft != "none" else None
                offset += len(own)
            pseudo_labels.write_unit(folder, k, labels, b"".join(rows))

    def _label(self, cuts: Sequence[Any]) -> List[Tuple[Label, bytes]]:
        """A label, without its place in a soft file, and rows of that file for each cut of a batch.

        A cut that is too short for an encoder frame gets an empty text.
        """
        start = time.perf_counter()
        found = {cut.id: (_as_label(cut.id, "", 0, 0.0, 0), b"") for cut in cuts}
        long_enough = [cut for cut in cuts if _num_encoder_frames(cut) > 0]
        if long_enough:
            batch = self.dataset[0, long_enough]
            if isinstance(batch, UserError):
                raise batch
            batch = batch.to(self.device)
            with torch.inference_mode():
                out, out_lens = self.model.encode(batch.features, batch.feature_lens, self.chunk_size)
            nbests = modified_beam_search(self.model, out, out_lens, self.beam_size)
            out = out.float().cpu().numpy()  # (N,T',D)
            for cut_id, nbest, matrix, frames in zip(batch.cut_ids, nbests, out, out_lens.tolist()):
                # NaN loses every comparison, which leaves such a list empty.
                if not nbest or not math.isfinite(nbest[0].score):
                    raise UserError(
                        f"cut {cut_id}: its score is not finite; look at its features, then at the teacher"
                    )
                tokens, score = nbest[0].tokens, nbest[0].score
                label = _as_label(cut_id, self.tokenizer.decode(tokens), len(tokens), score, frames)
                found[cut_id] = label, pseudo_labels.pack_soft(matrix[:frames], self.soft)
        seconds = round((time.perf_counter() - start) / len(cuts), 4)
        for label, _ in found.values():
            label["seconds"] = seconds
        return list(found.values())


def _as_label(cut_id: str, text: str, num_tokens: int, score: float, frames: int) -> Label:
    confidence = math.exp(score / max(1, num_tokens))
    return {
        "id": cut_id, "text": text, "num_tokens": num_tokens, "score": score, "confidence": confidence,
        "frames": frames, "soft": None,
    }  # fmt: skip


def _num_encoder_frames(cut: Any) -> int:
    return subsampled_lens(cut_frames(cut))
