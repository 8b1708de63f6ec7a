#!/usr/bin/env python3
"""What storing a teacher's encoder output costs and gains: size, accuracy, and time against running it.

  python tools/bench_soft_targets.py --exp-dir DIR --use-averaged-model --part dev --json soft.json

Encodes a part that has transcripts, stores the output in a temporary folder as local/pseudo_label.py --soft
does, and reads it back as training does. float32 is the output as it is, of which nothing is written.

  MB/hour        of audio: the size of the soft files; of float32 what the output would take
  WER %          of modified_beam_search on what was read back
  difference     of that from float32's, with the 95% interval and the p-value of a paired bootstrap
  KL/node        mean KL(as it is || as stored) of the teacher's distributions, in nats, on the pruned nodes
                 of the lattice of the hypothesis found before storage: where pseudo-labels are distilled on
  max error      of an encoder output, absolute
  audio s/s      seconds of audio per second for which a training batch gets its teacher_out on the device:
                 float32 by running the encoder on features that are there, the others by reading and padding

What is read has just been written: the page cache is warm, and the disk is not measured. One process reads.
The ways take turns on each batch; speeds are those of the median turn, ratios the median of the turns'.
Shapes: N batch, T' encoder frames, D encoder_dim, U tokens, S nodes kept per frame, V vocabulary.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd import build  # noqa: E402
from transducer_kd.data import pseudo_labels as pl  # noqa: E402
from transducer_kd.data.batch import Batch  # noqa: E402
from transducer_kd.data.datamodule import load_cuts  # noqa: E402
from transducer_kd.data.dataset import cut_text  # noqa: E402
from transducer_kd.decode import wer  # noqa: E402
from transducer_kd.decode.beam_search import modified_beam_search  # noqa: E402
from transducer_kd.log import UserError, progress, run_main, setup_logging, write_json  # noqa: E402
from transducer_kd.losses import pruned_rnnt  # noqa: E402
from transducer_kd.losses.distill import LatticeDistillOptions, lattice_kd_loss  # noqa: E402
from transducer_kd.train import ddp  # noqa: E402

AS_IT_IS = "float32"
STORED = tuple(dtype for dtype in pl.SOFT_TYPES if dtype != "none")


@dataclass
class Storage:
    """Sums and maxima over the batches."""

    seconds: List[float]  # of each turn
    bytes: int = 0
    utterances: List[wer.Utterance] = field(default_factory=list)
    divergence: float = 0.0  # nats, of all nodes together
    largest_error: float = 0.0


class Bench:
    """A teacher, and what the batches given to `add` say of each storage."""

    def __init__(self, loaded: Any, chunk_size: int, beam_size: int, repeats: int):
        self.model, self.tokenizer, self.loss = loaded.model, loaded.tokenizer, loaded.config.loss
        self.chunk_size, self.beam_size, self.repeats = chunk_size, beam_size, repeats
        self.device = next(loaded.model.parameters()).device
        self.backend = pruned_rnnt.resolve_backend(self.loss.backend)
        self.storages = {name: Storage([0.0] * repeats) for name in (AS_IT_IS, *STORED)}
        self.nodes, self.largest_value = 0, 0.0

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Measure a batch. UserError for scores that are not finite, or a full disk."""
        batch = batch.to(self.device)
        encode = partial(self.model.encode, batch.features, batch.feature_lens, self.chunk_size)
        out, lens = encode()
        self.storages[AS_IT_IS].bytes += out.element_size() * out.shape[2] * int(lens.sum())
        outs, ways = {AS_IT_IS: out}, {AS_IT_IS: lambda: encode()[0]}
        with tempfile.TemporaryDirectory() as folder:
            for dtype in STORED:
                soft_dir = Path(folder) / dtype
                places = store(soft_dir, out, lens, dtype)
                self.storages[dtype].bytes += (soft_dir / places[0]["path"]).stat().st_size
                ways[dtype] = partial(read, soft_dir, places, self.device)
                outs[dtype] = ways[dtype]()
            for turn in range(self.repeats):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    way()[:1, :1, :1].cpu()  # waits for the GPU
                    self.storages[name].seconds[turn] += time.perf_counter() - begin
        valid = torch.arange(out.shape[1], device=self.device) < lens[:, None]
        self.largest_value = max(self.largest_value, float(out[valid].abs().max()))
        nbests = {name: modified_beam_search(self.model, x, lens, self.beam_size) for name, x in outs.items()}
        for name, storage in self.storages.items():
            storage.largest_error = max(storage.largest_error, float((outs[name] - out)[valid].abs().max()))
            for cut_id, text, nbest in zip(batch.cut_ids, batch.texts, nbests[name]):
                if not nbest:  # NaN loses every comparison
                    raise UserError(f"cut {cut_id}: no finite score as {name}; look at its features")
                words = self.tokenizer.decode(nbest[0].tokens).split()
                storage.utterances.append((cut_id, text.split(), words))
        self._compare_nodes(outs, lens, [nbest[0].tokens for nbest in nbests[AS_IT_IS]])

    def _compare_nodes(self, outs: Dict[str, torch.Tensor], lens: torch.Tensor, tokens: List[Any]) -> None:
        """Add up the divergence on the lattice of `tokens`, pruned as the teacher's own training prunes."""
        model, joiner, loss = self.model, self.model.joiner, self.loss
        y = pad_sequence([torch.tensor(t, dtype=torch.int64) for t in tokens], True).to(self.device)
        boundary = pruned_rnnt.make_boundary(torch.tensor([len(t) for t in tokens]), lens)
        decoder_out = model.decode_labels(y)
        lm, am = model.simple_lm_proj(decoder_out), model.simple_am_proj(outs[AS_IT_IS])
        _, arcs = pruned_rnnt.simple_loss(lm, am, y, boundary, loss.lm_scale, loss.am_scale, self.backend)
        ranges = pruned_rnnt.prune_ranges(*arcs, boundary, loss.s_range)
        lm = joiner.decoder_proj(decoder_out)

        def logits_of(out: torch.Tensor) -> torch.Tensor:
            nodes = pruned_rnnt.gather_pruned(joiner.encoder_proj(out), lm, ranges)
            # (N,T',S,V). In float32 so small a divergence would be rounding errors, of either sign.
            return joiner(*nodes, project_input=False).double()

        before, options = logits_of(outs[AS_IT_IS]), LatticeDistillOptions("full")
        for name, out in outs.items():
            nats, counts = lattice_kd_loss(logits_of(out), before, y, ranges, boundary, options)
            self.storages[name].divergence += float(nats.sum())
        self.nodes += int(counts.sum())

    def row(self, name: str, audio_s: float) -> Dict[str, Any]:
        """The figures of a storage after `audio_s` seconds of audio."""
        mine, as_it_is = self.storages[name], self.storages[AS_IT_IS]
        return {
            "storage": name,
            "mb_per_hour": mine.bytes / 1e6 / (audio_s / 3600),
            "wer": wer.word_error_rate(mine.utterances),
            "compared": asdict(wer.compare(as_it_is.utterances, mine.utterances)) if name in STORED else None,
            "kl_per_node": mine.divergence / self.nodes,
            "largest_error": mine.largest_error,
            "seconds_of_turns": mine.seconds,
            "audio_s_per_s": audio_s / statistics.median(mine.seconds),
            "times_as_fast": statistics.median(a / b for a, b in zip(as_it_is.seconds, mine.seconds)),
        }


def store(folder: Path, out: torch.Tensor, lens: torch.Tensor, dtype: str) -> List[Dict[str, Any]]:
    """Write a batch as a work unit -> what read_soft_targets wants of each utterance."""
    labels, rows, offset, dim = [], [], 0, out.shape[2]
    for matrix, frames in zip(out.cpu().numpy(), lens.tolist()):
        labels.append({**dict.fromkeys(pl.LABEL_KEYS), "frames": frames, "soft": [offset, frames]})
        rows.append(pl.pack_soft(matrix[:frames], dtype))
        offset += len(rows[-1])
    pl.write_unit(folder, 0, labels, b"".join(rows))
    written = pl.read_unit(folder, 0, pl.soft_row_bytes(dim, dtype))
    return [{**label, "offset": label["soft"][0], "dim": dim, "dtype": dtype} for label in written]


def read(folder: Path, places: Sequence[Dict[str, Any]], device: torch.device) -> torch.Tensor:
    """teacher_out (N,T',D) of a batch."""
    rows = [torch.from_numpy(pl.read_soft_targets(folder, place)) for place in places]
    return pad_sequence(rows, batch_first=True).to(device)


def run(args: argparse.Namespace) -> Dict[str, Any]:
    device = ddp.setup(args.device).device
    weights = (args.exp_dir, args.epoch, args.avg, args.use_averaged_model)
    loaded = build.load_model(*weights, str(device), args.lang_dir)
    data, encoder = loaded.config.data, loaded.config.model.encoder
    data.fbank_dir = args.fbank_dir or data.fbank_dir
    cuts = load_cuts(Path(data.fbank_dir), args.part)
    if not any(cut_text(cut).split() for cut in cuts):
        raise UserError(f"part {args.part} has no transcripts to score with; name one that has, such as dev")
    chunk_size = args.chunk_size if args.chunk_size >= 0 else encoder.chunk_size
    bench = Bench(loaded, chunk_size, args.beam_size, args.repeats)
    batches = build.build_data(data, loaded.tokenizer).test_batches(args.part, args.max_duration)
    for batch in progress(batches, desc="batches"):
        bench.add(batch)
    audio_s = sum(cut.duration for cut in cuts)
    return {
        "command": " ".join(["tools/bench_soft_targets.py", *sys.argv[1:]]),
        "machine": f"{device}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        "teacher": f"{loaded.checkpoint} of {loaded.config.phase}, D={encoder.encoder_dim}",
        "part": f"{args.part}, {len(cuts)} utterances, {audio_s:.1f} s, {bench.nodes} nodes; chunk "
        f"{chunk_size}, beam {args.beam_size}; encoder outputs up to {bench.largest_value:.3g}",
        "rows": [bench.row(name, audio_s) for name in bench.storages],
    }


def table(result: Dict[str, Any]) -> str:
    """The result as text."""
    cells = ["storage|MB/hour|WER %|difference|95% interval|p|KL/node|max error|audio s/s".split("|")]
    for row in result["rows"]:
        x, against = row["compared"], "-|-|-"
        if x:
            interval = f"{x['low']:+.2f} to {x['high']:+.2f}"
            against = f"{x['difference']:+.2f}|{interval}|{x['p_value']:.3f}"
        first = f"{row['storage']}|{row['mb_per_hour']:.2f}|{row['wer']:.2f}"
        last = f"{row['kl_per_node']:.1e}|{row['largest_error']:.1e}|{row['audio_s_per_s']:.0f}"
        cells.append(f"{first}|{against}|{last}".split("|"))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [f"{key}: {result[key]}" for key in ("command", "machine", "teacher", "part")]
    lines += ["", *("  ".join(f"{c:>{w}}" for c, w in zip(line, widths)) for line in cells), ""]
    faster = " and ".join(f"{r['storage']} {r['times_as_fast']:.1f}" for r in result["rows"][1:])
    return "\n".join([*lines, f"read with a warm page cache: {faster} times as fast as the encoder"])


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="experiment folder of the teacher, with epoch-N.pt")
    add("--part", required=True, help="what to encode: <fbank-dir>/cuts_<part>.jsonl.gz, with transcripts")
    add("--epoch", type=int, default=0, help="N for epoch-N.pt; 0: the last one; -1: best-valid.pt")
    add("--avg", type=int, default=1, help="average over this many epochs, ending at --epoch")
    add("--use-averaged-model", action="store_true", help="average all weights seen in those epochs")
    add("--chunk-size", type=int, default=-1, help="encoder frames; 0: full context; -1: as trained")
    add("--beam-size", type=int, default=4, help="hypotheses kept (default %(default)s)")
    add("--max-duration", type=float, default=200.0, help="audio seconds in a batch (%(default)s)")
    add("--repeats", type=int, default=5, help="turns of the timing (default %(default)s)")
    add("--fbank-dir", default="", help="folder with cuts_<part>.jsonl.gz (default: as in training)")
    add("--lang-dir", default="", help="folder with bpe.model (default: as in training)")
    add("--device", default="auto", help="auto (the GPU where there is one), cpu, cuda or cuda:N")
    add("--threads", type=int, help="CPU threads of one operation (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    for name in ("avg", "beam_size", "repeats", "threads", "max_duration"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be greater than 0")
    if args.epoch == -1 and (args.avg > 1 or args.use_averaged_model):
        parser.error("--epoch -1 is best-valid.pt: leave --avg, --use-averaged-model out")
    return args


def main() -> None:
    args = parse_arguments()
    setup_logging()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    result = run(args)
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run_main(main)
