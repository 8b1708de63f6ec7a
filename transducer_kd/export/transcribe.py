"""Recognise speech with a model folder that local/export.py has written: files, or audio as it comes in.

  python -m transducer_kd.export.transcribe MODEL_DIR a.wav b.flac
  arecord -q -t raw -f S16_LE -r 16000 -c 1 | python -m transducer_kd.export.transcribe MODEL_DIR -

Each file gives one line, `file: words`. What comes from stdin (-) has to be raw PCM, 16-bit little-endian,
16 kHz, mono; it gives a line for every utterance. A pause of --pause seconds ends an utterance, and a
streaming model begins anew after it, in files too. It shows its words as they come: on a terminal the line is
written anew, elsewhere lines that end in " ..." follow each other (--final-only leaves them out). Streamed
audio is forgotten as it is heard; --mode offline holds a whole file, and --two-pass the encoder frames of an
utterance.

One pass runs in sherpa-onnx, as in a phone. --two-pass lets the LAS of the folder choose from the first
pass's hypotheses when an utterance is over.
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO, Iterator, List, Optional, TextIO

import numpy as np
import soundfile

from transducer_kd.export.folder import ModelFolder, open_folder
from transducer_kd.export.sherpa import DECODING_METHODS, SAMPLING_RATE, SherpaOffline, SherpaStreaming
from transducer_kd.log import UserError, one_line, run_main, setup_logging

# No torch here, nor in what is imported above: one pass should start at once (a test asserts it).

STDIN = "-"
_PIECE = SAMPLING_RATE // 5  # samples that are read at once
_BYTES_PER_SAMPLE = 2
# How files begin that are no raw PCM.
_CONTAINERS = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3", b"FORM": "AIFF"}
_RECORD = "arecord -q -t raw -f S16_LE -r 16000 -c 1"


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
    add("--pause", type=float, default=1.2, metavar="S", help="what ends an utterance (default 1.2)")
    add("--final-only", action="store_true", help="print no words before an utterance is over")
    add("--num-threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args(argv)
    if args.two_pass and args.decoding_method:
        parser.error("--two-pass has modified_beam_search as its first pass; leave --decoding-method out")
    if not args.pause > 0 or args.num_threads < 1:
        parser.error("--pause must be greater than 0, and --num-threads 1 or more")
    if args.inputs.count(STDIN) > 1:
        parser.error("stdin (-) can be heard once")
    return args


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    folder = open_folder(args.model_dir)
    mode = _choose_mode(folder, args)
    # What cannot be heard should be known before the first file is.
    for name in args.inputs:
        _check_stdin(folder, mode) if name == STDIN else _open(name).close()
    recogniser = _build_recogniser(folder, mode, args)
    try:
        printer = Printer(sys.stdout, not args.final_only)
        for name in args.inputs:
            if name == STDIN:
                _transcribe_stdin(recogniser, printer)
            else:
                _transcribe_file(recogniser, mode, name, printer)
    except BrokenPipeError:
        # Who read the words has had enough (| head -1). Python would say so again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


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


# ---------------------------------------------------------------- audio


def _open(name: str) -> soundfile.SoundFile:
    """Open an audio file. UserError for one that is missing, no audio, empty, or not 16 kHz mono."""
    path = Path(name)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no file" if path.exists() else "no such file"
        raise UserError(f"{path}: {kind}; name an audio file, or send raw PCM to stdin (-)")
    mend = f"ffmpeg -i {shlex.quote(name)} -ar 16000 -ac 1 {shlex.quote(str(path.with_suffix('.16k.wav')))}"
    if not path.stat().st_size:
        raise UserError(f"{path} is empty (0 bytes); record it again or leave it out")
    try:
        file = soundfile.SoundFile(name)
    except TypeError:  # what libsndfile wants to be told of a name that ends like this
        raise UserError(
            f"{path}: raw PCM is heard from stdin: give - instead, and < {shlex.quote(name)}"
        ) from None
    except soundfile.LibsndfileError as e:
        raise UserError(f"{path} cannot be read as audio ({one_line(e)}); convert it: {mend}") from None
    problem = None
    if file.samplerate != SAMPLING_RATE:
        problem = (
            f"{path} has {file.samplerate} Hz, and the model hears {SAMPLING_RATE} Hz; convert it: {mend}"
        )
    elif file.channels != 1:
        problem = f"{path} has {file.channels} channels, and the model hears one; convert it: {mend}"
    elif not file.frames:
        problem = f"{path} is empty: it has a header and no samples; record it again or leave it out"
    if problem:
        file.close()
        raise UserError(problem)
    return file


def _file_pieces(name: str) -> Iterator[np.ndarray]:
    """The samples of a file, float32, a piece at a time."""
    with _open(name) as file:
        for piece in file.blocks(_PIECE, dtype="float32"):
            if not np.isfinite(piece).all():
                raise UserError(
                    f"{name} holds samples that are no numbers (NaN or infinite); record it again"
                )
            yield piece


def _check_stdin(folder: ModelFolder, mode: str) -> None:
    if mode != "streaming":
        raise UserError(
            f"stdin is heard as it comes, and {folder.path} in mode {mode} hears whole files; record a file"
            + (", or leave --mode out" if "streaming" in folder.modes else "")
        )
    if sys.stdin.isatty():
        raise UserError(f"stdin is a terminal; send audio there: {_RECORD} | ...")


def _stdin_pieces(file: BinaryIO) -> Iterator[np.ndarray]:
    """Samples of raw PCM, float32, as they come in. UserError where none come, or where it is no raw PCM."""
    left, is_begun = b"", False
    while True:
        data = file.read1(_PIECE * _BYTES_PER_SAMPLE)
        if not data:
            break
        data = left + data
        kind = None if is_begun else next((k for m, k in _CONTAINERS.items() if data.startswith(m)), None)
        if kind:
            raise UserError(
                f"stdin holds a {kind} file, and raw PCM is wanted; give the file's name instead of -, or "
                "convert it on the way: ffmpeg -i - -f s16le -ar 16000 -ac 1 -"
            )
        whole = len(data) // _BYTES_PER_SAMPLE * _BYTES_PER_SAMPLE
        left = data[whole:]
        if whole:
            is_begun = True
            yield np.frombuffer(data[:whole], dtype="<i2").astype(np.float32) / 32768
    if not is_begun:
        raise UserError(f"no audio came from stdin; send raw PCM there: {_RECORD} | ...")


# ---------------------------------------------------------------- words


class Printer:
    """Writes lines of words, and shows before they are complete what has been heard."""

    def __init__(self, out: TextIO, with_partials: bool):
        self._out, self._with_partials, self._is_terminal = out, with_partials, out.isatty()
        self._shown = ""

    def partial(self, label: str, text: str) -> None:
        """Words of an utterance that goes on; nothing is written until they change."""
        if not self._with_partials or text == self._shown:
            return
        self._shown = text
        if self._is_terminal:
            # A line longer than the terminal could not be written anew: its end is of interest.
            room = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r{(label + text)[-room:]}\x1b[K")
        else:
            self._out.write(f"{label}{text} ...\n")
        self._out.flush()

    def final(self, label: str, text: str) -> None:
        """All words of an utterance."""
        self._out.write(("\r" if self._is_terminal else "") + f"{label}{text}".rstrip())
        self._out.write("\x1b[K\n" if self._is_terminal else "\n")
        self._out.flush()
        self._shown = ""


def _transcribe_file(recogniser: Any, mode: str, name: str, printer: Printer) -> None:
    """One line for a file, of all utterances that pauses divide it into where it streams."""
    label = f"{name}: "
    if mode != "streaming":
        found = recogniser.decode(np.concatenate(list(_file_pieces(name))))
        printer.final(label, found if isinstance(found, str) else found.text())
        return
    stream, said = recogniser.stream(), []
    for piece in _file_pieces(name):
        stream.accept(piece)
        text = stream.text()
        if stream.at_pause():
            said += [stream.final_text()] if text else []
            stream.restart()
            text = ""
        printer.partial(label, " ".join([*said, text]).rstrip())
    stream.finish()
    printer.final(label, " ".join([*said, stream.final_text()]))


def _transcribe_stdin(recogniser: Any, printer: Printer) -> None:
    """One line for every utterance. Ctrl-C ends the audio, as its end does."""
    stream = recogniser.stream()
    try:
        for piece in _stdin_pieces(sys.stdin.buffer):
            stream.accept(piece)
            text = stream.text()
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


if __name__ == "__main__":
    setup_logging()
    run_main(main)
