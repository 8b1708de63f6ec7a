"""Recognise speech with a model folder that local/export.py has written: files, or audio as it comes in.

  python -m transducer_kd.export.transcribe MODEL_DIR a.wav b.flac
  arecord -q -t raw -f S16_LE -r 16000 -c 1 | python -m transducer_kd.export.transcribe MODEL_DIR -

Each file gives one line, `file: words`; one that is damaged gives an error and, after the others, status 1.
What comes from stdin (-) has to be raw PCM, 16-bit little-endian, 16 kHz, mono; it gives a line for every
utterance. A pause of --pause seconds ends an utterance, and a streaming model begins anew after it, in files
too. It shows its words as they come: on a terminal the line is written anew, elsewhere lines that end in
" ..." follow each other, for stdin alone (--final-only leaves both out). Streamed audio is forgotten as it is
heard; --mode offline hears a whole file as one utterance, and --two-pass holds the encoder frames of one.

One pass runs in sherpa-onnx, as in a phone. --two-pass lets the LAS of the folder choose from the first
pass's hypotheses when an utterance is over.
"""

import argparse
import logging
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, List, Optional, TextIO

import numpy as np

from transducer_kd.export.audio import RECORD, file_pieces, open_audio, stdin_pieces, warn_of_missing
from transducer_kd.export.folder import ModelFolder, open_folder
from transducer_kd.export.sherpa import (
    DECODING_METHODS,
    PAUSE_S,
    SAMPLING_RATE,
    SherpaOffline,
    SherpaStreaming,
)
from transducer_kd.log import UserError, one_line, run_main, setup_logging

# No torch here, nor in what is imported above: one pass should start at once (a test asserts it).

STDIN = "-"
# Recipes leave longer utterances out (max_cut_s: 20 to 25 s, and silence around some): heard whole, a longer
# file loses words (228 s with pauses, recipe two_pass at mini: WER 46 %, streaming 2.8 %).
LONGEST_LEARNT_S = 30


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m transducer_kd.export.transcribe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model_dir", type=Path, metavar="MODEL_DIR", help="the folder export/ of a phase")
    add("inputs", nargs="+", metavar="FILE", help="audio file, 16 kHz mono; - for raw PCM from stdin")
    add(
        "--precision", choices=("auto", "float", "int8"), default="auto",
        help="auto (default): int8 where the folder has it",
    )  # fmt: skip
    add(
        "--mode", choices=("auto", "streaming", "offline"), default="auto",
        help="auto (default): streaming where the model streams; offline hears whole files",
    )  # fmt: skip
    add("--decoding-method", choices=DECODING_METHODS, help=f"default {DECODING_METHODS[0]}")
    add("--two-pass", action="store_true", help="modified_beam_search, and the LAS chooses")
    add(
        "--pause", type=float, default=PAUSE_S, metavar="S",
        help=f"what ends an utterance (default {PAUSE_S})",
    )  # fmt: skip
    add("--final-only", action="store_true", help="print no words before an utterance is over")
    add("--num-threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    if args.two_pass and args.decoding_method:
        parser.error("--two-pass has modified_beam_search as its first pass; leave --decoding-method out")
    if not (math.isfinite(args.pause) and args.pause > 0):
        parser.error("--pause must be a number of seconds greater than 0")
    num_cpus = os.cpu_count() or 1
    if not 1 <= args.num_threads <= num_cpus:
        parser.error(f"--num-threads must be from 1 to {num_cpus}, the CPUs of this machine")
    if args.inputs.count(STDIN) > 1:
        parser.error("stdin (-) can be heard once")
    return args


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    if sys.stdout is None:  # >&-
        raise UserError("stdout is closed, and words are written there; name a file for them: > FILE")
    printer = Printer(sys.stdout, not args.final_only)
    try:
        return transcribe(args, printer)
    except KeyboardInterrupt:
        # Not left to run_main: it says that the same command goes on, and this one begins anew.
        printer.clear()
        return 130
    except BrokenPipeError:
        # Who read the words has had enough (| head -1). Python would say so again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def transcribe(args: argparse.Namespace, printer: "Printer") -> int:
    """Hear all inputs. Status 1 where one turned out to be damaged."""
    folder = open_folder(args.model_dir)
    mode = _choose_mode(folder, args)
    # What cannot be heard should be known before the first file is.
    for name in args.inputs:
        _check_stdin(folder, mode) if name == STDIN else open_audio(name).close()
    recogniser = _build_recogniser(folder, mode, args)
    status = 0
    for name in args.inputs:
        try:
            if name == STDIN:
                _transcribe_stdin(recogniser, printer)
            elif mode == "streaming":
                _transcribe_file(recogniser, name, printer)
            else:
                _transcribe_whole(recogniser, folder, name, printer)
        except UserError as e:
            printer.clear()
            logging.error("%s", e)
            status = 1
    return status


# ---------------------------------------------------------------- the model


def _choose_mode(folder: ModelFolder, args: argparse.Namespace) -> str:
    if args.mode == "auto":
        return "streaming" if "streaming" in folder.modes else "offline"
    if args.mode not in folder.modes:
        raise UserError(f"{folder.path} has no mode {args.mode}; it has {', '.join(folder.modes)}")
    return args.mode


def _build_recogniser(folder: ModelFolder, mode: str, args: argparse.Namespace) -> Any:
    precision = args.precision
    if precision == "auto":
        precision = "int8" if "int8" in folder.precisions else "float"
    if args.two_pass:
        import torch

        from transducer_kd.export.two_pass import TwoPassRecogniser

        torch.set_num_threads(args.num_threads)  # of the beam search
        return TwoPassRecogniser(folder, precision, mode, args.num_threads, args.pause)
    options = {
        "precision": precision,
        "num_threads": args.num_threads,
        "decoding_method": args.decoding_method or DECODING_METHODS[0],
    }
    if mode == "streaming":
        return SherpaStreaming(folder, pause_s=args.pause, **options)
    return SherpaOffline(folder, **options)


def _check_stdin(folder: ModelFolder, mode: str) -> None:
    if mode != "streaming":
        raise UserError(
            f"stdin is heard as it comes, and {folder.path} in mode {mode} hears whole files; record a file"
            + (", or leave --mode out" if "streaming" in folder.modes else "")
        )
    if sys.stdin is None:  # <&-
        raise UserError(f"stdin is closed; send audio there: {RECORD} | ...")
    if sys.stdin.isatty():
        raise UserError(f"stdin is a terminal; send audio there: {RECORD} | ...")


# ---------------------------------------------------------------- words


class Printer:
    """Writes lines of words, and shows before they are complete what has been heard."""

    def __init__(self, out: TextIO, with_partials: bool):
        self._out, self._with_partials, self.is_terminal = out, with_partials, out.isatty()
        self._shown = ""

    def partial(self, label: str, text: str) -> None:
        """Words of an utterance that goes on; nothing is written until they change."""
        if not self._with_partials or text == self._shown:
            return
        self._shown = text
        if self.is_terminal:
            # A line longer than the terminal could not be written anew: its end is of interest.
            room = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r{(label + text)[-room:]}\x1b[K")
        else:
            self._out.write(f"{label}{text} ...\n")
        self._out.flush()

    def final(self, label: str, text: str) -> None:
        """All words of an utterance."""
        self._out.write(("\r" if self.is_terminal else "") + f"{label}{text}".rstrip())
        self._out.write("\x1b[K\n" if self.is_terminal else "\n")
        self._out.flush()
        self._shown = ""

    def clear(self) -> None:
        """Take words back that a terminal shows, and that will not be complete."""
        if self.is_terminal and self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()
        self._shown = ""


def _transcribe_file(recogniser: Any, name: str, printer: Printer) -> None:
    """One line for a file, of all utterances that pauses divide it into."""
    label, num_samples = f"{name}: ", 0
    stream, said = recogniser.stream(), []
    for piece in file_pieces(name):
        num_samples += len(piece)
        stream.accept(piece)
        text = stream.text()
        if stream.at_pause():
            said += [stream.final_text()] if text else []
            stream.restart()
            text = ""
        if printer.is_terminal:  # elsewhere all words of the file would be there again in each line
            printer.partial(label, " ".join([*said, text]).rstrip())
    stream.finish()
    printer.final(label, " ".join([*said, stream.final_text()]))
    warn_of_missing(name, num_samples)


def _transcribe_whole(recogniser: Any, folder: ModelFolder, name: str, printer: Printer) -> None:
    """One line for a file, heard as one utterance."""
    samples = np.concatenate(list(file_pieces(name)))
    length = f"{len(samples) / SAMPLING_RATE:.1f} s"
    mend = "use --mode streaming" if "streaming" in folder.modes else "cut it at its pauses"
    if len(samples) > LONGEST_LEARNT_S * SAMPLING_RATE:
        logging.warning(
            "%s is heard as one utterance of %s, and models learn from some %d s at most: expect wrong "
            "and missing words; %s", name, length, LONGEST_LEARNT_S, mend,
        )  # fmt: skip
    try:
        found = recogniser.decode(samples)
    except Exception as e:
        # Kinds of onnxruntime are no RuntimeErrors, and it is there for two passes only.
        is_of_runtime = isinstance(e, (RuntimeError, MemoryError)) or "onnxruntime" in type(e).__module__
        if not is_of_runtime:
            raise
        raise UserError(
            f"{name} ({length}) could not be heard whole, for want of memory where it is long; {mend} "
            f"({one_line(e)})"
        ) from None
    printer.final(f"{name}: ", found if isinstance(found, str) else found.text())
    warn_of_missing(name, len(samples))


def _transcribe_stdin(recogniser: Any, printer: Printer) -> None:
    """One line for every utterance. Ctrl-C ends the audio, as its end does."""
    stream, num_samples, has_words = recogniser.stream(), 0, False
    try:
        for piece in stdin_pieces(sys.stdin.buffer):
            num_samples += len(piece)
            stream.accept(piece)
            text = stream.text()
            has_words = has_words or bool(text)
            if not stream.at_pause():
                printer.partial("", text)
                continue
            if text:
                printer.final("", stream.final_text())
            stream.restart()
    except KeyboardInterrupt:
        pass
    stream.finish()
    if stream.text():
        printer.final("", stream.final_text())
    elif not has_words:
        logging.warning("stdin: %.1f s were heard, and no words", num_samples / SAMPLING_RATE)


if __name__ == "__main__":
    setup_logging()
    run_main(main)
