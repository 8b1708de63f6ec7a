"""Whole parts decoded with a trained phase: result files, records, a table, and the tuning of a second pass.

What local/decode.py does once its options are read.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from transducer_kd.data.batch import Batch
from transducer_kd.decode import records, rescore, wer
from transducer_kd.decode.evaluate import MethodResult, PartDecoder, SearchOptions, is_rescore
from transducer_kd.log import UserError

Row = Tuple[str, MethodResult, wer.WerReport]  # the first is the part
_VALUE_BYTES = 4  # float32
_SCORES = ("wer", "wer_low", "wer_high", "errors", "insertions", "deletions", "substitutions", "ref_words")


@dataclass(frozen=True)
class Decoding:
    """A trained phase with its data, and how parts are decoded with it."""

    exp_dir: Path  # gets the results
    loaded: Any  # build.LoadedModel, in the mode that options.chunk_size says
    size: Any  # compress.size.Size of this mode
    data: Any  # DataModule
    options: SearchOptions
    max_duration_s: float  # audio in a batch
    num_utts: int  # about the first so many of a part, of which nothing is kept for reports; 0: all
    lattice_dir: Optional[Path]  # where the lattices of a part go, in a folder of its name; None: nowhere
    run: Dict[str, str]  # of a record: commit, command

    def with_weights(self, methods: Sequence[str], tune_part: str, test_parts: Sequence[str]) -> "Decoding":
        """The same with weights for the *_las_rescore ones of `methods`: tuned now, on `tune_part`, and kept
        in rescore.json, or where that is empty as they were kept earlier.

        UserError where the model was trained on `tune_part`, or for the reasons of rescore.py.
        """
        if tune_part in self.loaded.config.data.train_parts:
            raise UserError(
                f"--tune-part {tune_part}: {self.exp_dir} was trained on it, so its n-best lists are better "
                "there than elsewhere; name a dev part"
            )
        path, tunings = self.exp_dir / "rescore.json", []
        decoder = self._decoder(tune_part)
        for method in filter(is_rescore, methods):
            settings = {"chunk_size": self.options.chunk_size, **self.options.of_nbest(method)}
            about = {"method": method, "checkpoint": self.loaded.checkpoint, "settings": settings}
            if tune_part:
                scored = decoder.scored_nbests(method)
                tunings.append(rescore.tune(scored, decoder.words, part=tune_part, **about))
            else:
                tunings.append(rescore.load_tuning(path, test_parts=test_parts, **about))
            logging.info("%s", tunings[-1].line())
        if tune_part and not self.num_utts:
            rescore.save_tunings(path, tunings)
        weights = {tuning.method: tuning.weights() for tuning in tunings}
        return dataclasses.replace(self, options=dataclasses.replace(self.options, weights=weights))

    def decode(self, part: str, methods: Sequence[str]) -> Iterator[Row]:
        """Decode a part with all methods; files and records are written as the methods finish."""
        checkpoint = self.loaded.checkpoint
        logging.info("decoding %s with %s", part, checkpoint)
        for result in self._decoder(part).decode(methods):
            suffix = f"{checkpoint}-{self.options.suffix(result.method)}"
            if self.num_utts:
                suffix += f"-first-{len(result.utterances)}"
            folder = self.exp_dir / result.method
            report = wer.write_results(folder, part, suffix, result.utterances, result.method)
            logging.info("[%s-%s] %s, %.1f s", part, result.method, report.line(), result.decode_s)
            if not report.ref_words:
                logging.warning("%s has no reference words: nothing to score, so no record", part)
            elif not self.num_utts:
                record = self._record((part, result, report), f"{result.method}/recogs-{part}-{suffix}.txt")
                records.append_record(self.exp_dir / "metrics.json", record)
            yield part, result, report

    def _decoder(self, part: str) -> PartDecoder:
        loaded, device = self.loaded, next(self.loaded.model.parameters()).device
        lattice_dir = self.lattice_dir / part if self.lattice_dir else None
        return PartDecoder(
            loaded.model, loaded.tokenizer, lambda: self._batches(part), self.options, device, lattice_dir
        )

    def _batches(self, part: str) -> Iterator[Batch]:
        seen = 0
        for batch in self.data.test_batches(part, self.max_duration_s):
            yield batch
            seen += len(batch.cut_ids)
            if 0 < self.num_utts <= seen:
                return

    def _record(self, row: Row, recogs: str) -> records.Record:
        part, result, report = row
        config, model, method = self.loaded.config, self.loaded.model, result.method
        first_pass = model.first_pass_parameters()
        las = model.deployed_parameters() - first_pass if is_rescore(method) else 0
        stored = self.size.value_bytes // _VALUE_BYTES + las
        return records.Record(
            **{name: getattr(config, name) for name in ("recipe", "corpus", "scale", "phase")},
            mode="streaming" if self.options.chunk_size else "offline",
            chunk_size=self.options.chunk_size,
            left_context=config.model.encoder.left_context,
            checkpoint=self.loaded.checkpoint,
            params_deployed=stored,
            bytes=_VALUE_BYTES * stored + self.size.index_bytes,
            index_bytes=self.size.index_bytes,
            params_dense=first_pass + las,
            params_layers=sum(p.numel() for p in model.encoder.layers.parameters()),
            test_set=part,
            num_utts=len(result.utterances),
            method=method,
            parameters=self.options.of(method),
            recogs=recogs,
            **{name: getattr(report, name) for name in _SCORES},
            audio_s=round(result.audio_s, 2),
            decode_s=round(result.decode_s, 3),
            second_pass_s=None if result.second_pass_s is None else round(result.second_pass_s, 3),
            device=str(next(model.parameters()).device),
            num_threads=torch.get_num_threads(),
            **self.run,
        )


def table(rows: Sequence[Row]) -> str:
    """The results for the terminal: a line for each part and method.

    "2nd/1st": time of the second pass as a share of the first pass's, encoder included.
    """
    width = max(len(part) for part, _, _ in rows)
    lines: List[str] = [
        f"{'part':{width}}  {'method':34}    WER %   95% interval  errors  words  decoded in  x real time  "
        "2nd/1st"
    ]
    for part, result, report in rows:
        speed = result.audio_s / max(result.decode_s, 1e-9)
        interval = f"{report.wer_low:.2f} to {report.wer_high:.2f}"
        share = "-"
        if result.second_pass_s is not None:
            share = f"{100 * result.second_pass_s / max(result.decode_s - result.second_pass_s, 1e-9):.1f} %"
        lines.append(
            f"{part:{width}}  {result.method:34}  {report.wer:7.2f}  {interval:>13}  {report.errors:6d}  "
            f"{report.ref_words:5d}  {result.decode_s:8.1f} s  {speed:11.0f}  {share:>7}"
        )
    return "\n".join(lines)
