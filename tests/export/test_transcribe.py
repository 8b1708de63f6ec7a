"""The program on a device: what it prints, and what it refuses."""

import io
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from tests.data.test_features import speechlike
from tests.export.folders import with_int8, without_metadata
from transducer_kd.export import transcribe
from transducer_kd.export.folder import open_folder
from transducer_kd.export.sherpa import SherpaOffline, SherpaStream, SherpaStreaming
from transducer_kd.export.two_pass import TwoPassRecogniser
from transducer_kd.log import UserError, one_line

SAMPLES = speechlike(40000)


@pytest.fixture
def wav(tmp_path):
    return written(tmp_path / "a.wav")


def written(path, samples=SAMPLES, rate=16000):
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def as_pcm(samples):
    return (np.clip(samples, -1, 32767 / 32768) * 32768).astype("<i2").tobytes()


def run(capsys, *args):
    """Lines that the program prints, called in this process."""
    assert transcribe.main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out.splitlines()


def listening_to(monkeypatch, pcm, is_terminal=False, step=1000):
    """Let stdin hold `pcm`, of which a read gets `step` bytes, as from a pipe."""

    class Pipe(io.BytesIO):
        def read1(self, size=-1):
            return self.read(min(step, size))

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=Pipe(pcm), isatty=lambda: is_terminal))


# ---------------------------------------------------------------- words


def test_a_file_streams_and_its_words_come_bit_by_bit(streaming_folder, wav, capsys, monkeypatch):
    expected = SherpaStreaming(open_folder(streaming_folder)).decode(SAMPLES)
    assert run(capsys, streaming_folder, wav) == [f"{wav}: {expected}"] and expected, "no terminal: one line"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "1000")
    assert transcribe.main([str(streaming_folder), str(wav)]) == 0
    before, *partials, last = capsys.readouterr().out.split("\r")
    assert (before, last) == ("", f"{wav}: {expected}\x1b[K\n")
    shown = [re.fullmatch(f"{re.escape(str(wav))}: (.*)\x1b\\[K", line).group(1) for line in partials]
    assert len(shown) > 2 and len(set(shown)) == len(shown), "written anew without new words"
    assert all(expected.startswith(words) for words in shown)
    assert transcribe.main([str(streaming_folder), str(wav), "--final-only"]) == 0
    assert capsys.readouterr().out == f"\r{last}"


def test_several_files_of_several_kinds(streaming_folder, wav, capsys):
    flac, short = written(wav.with_suffix(".flac")), written(wav.with_name("b.wav"), SAMPLES[:160])
    recogniser = SherpaStreaming(open_folder(streaming_folder))
    expected = [
        f"{wav}: {recogniser.decode(SAMPLES)}",
        f"{short}: {recogniser.decode(SAMPLES[:160])}".rstrip(),
    ]
    lines = run(capsys, streaming_folder, wav, flac, short, "--final-only")
    assert [lines[0], lines[2]] == expected and lines[1].startswith(f"{flac}: ")


def test_modes_methods_and_the_second_pass(las_folder, offline_folder, wav, capsys):
    folder = open_folder(las_folder)
    for args, expected in (
        (["--mode", "offline"], SherpaOffline(folder).decode(SAMPLES)),
        (
            ["--decoding-method", "modified_beam_search"],
            SherpaStreaming(folder, decoding_method="modified_beam_search").decode(SAMPLES),
        ),
        (["--two-pass"], TwoPassRecogniser(folder).decode(SAMPLES).text()),
        (
            ["--two-pass", "--mode", "offline"],
            TwoPassRecogniser(folder, mode="offline").decode(SAMPLES).text(),
        ),
    ):
        assert run(capsys, las_folder, wav, "--final-only", *args) == [f"{wav}: {expected}"], args
    expected = SherpaOffline(open_folder(offline_folder)).decode(SAMPLES)
    assert run(capsys, offline_folder, wav) == [f"{wav}: {expected}"], "it hears whole files: no words before"


def test_int8_is_taken_where_it_is_there(streaming_folder, wav, tmp_path, capsys, monkeypatch):
    taken = []

    class Recogniser(SherpaStreaming):
        def __init__(self, folder, precision="float", **options):
            taken.append(precision)
            super().__init__(folder, precision, **options)

    monkeypatch.setattr(transcribe, "SherpaStreaming", Recogniser)
    both = with_int8(streaming_folder, tmp_path / "both").path
    for args in ([streaming_folder, wav], [both, wav], [both, wav, "--precision", "float"]):
        run(capsys, *args)
    assert taken == ["float", "int8", "float"]
    with pytest.raises(UserError, match="has no encoder-streaming.int8.onnx"):
        transcribe.main([str(streaming_folder), str(wav), "--precision", "int8"])


@pytest.mark.parametrize("step", [1, 999, 100000])
def test_stdin(streaming_folder, monkeypatch, capsys, step):
    pcm = as_pcm(SAMPLES[:20000] if step == 1 else SAMPLES)
    listening_to(monkeypatch, pcm, step=step)
    heard = np.frombuffer(pcm, dtype="<i2").astype(np.float32) / 32768
    *partials, last = run(capsys, streaming_folder, "-", "--pause", "60")
    assert last == SherpaStreaming(open_folder(streaming_folder)).decode(heard) != ""
    assert len(partials) > 1 and all(line.endswith(" ...") for line in partials)


@pytest.mark.parametrize("two_pass", [[], ["--two-pass"]])
def test_a_pause_ends_a_line(las_folder, monkeypatch, capsys, two_pass):
    """Where a pause of two frames is enough, words come in several lines."""
    listening_to(monkeypatch, as_pcm(SAMPLES))
    lines = run(capsys, las_folder, "-", "--pause", "0.08", "--final-only", *two_pass)
    listening_to(monkeypatch, as_pcm(SAMPLES))
    (line,) = run(capsys, las_folder, "-", "--pause", "60", "--final-only", *two_pass)
    assert len(lines) > 1 and all(lines), "an utterance without words has no line"
    assert 0.5 < len("".join(lines)) / len(line) < 2


@pytest.mark.parametrize("two_pass", [[], ["--two-pass"]])
def test_a_file_goes_by_utterances(las_folder, tmp_path, monkeypatch, capsys, two_pass):
    """After a pause a model begins anew, as for stdin."""
    wav = tmp_path / "a.wav"
    soundfile.write(wav, SAMPLES, 16000, subtype="PCM_16")
    listening_to(monkeypatch, soundfile.read(wav, dtype="int16")[0].tobytes(), step=100000)
    options = ["--pause", "0.08", "--final-only", *two_pass]
    lines = run(capsys, las_folder, "-", *options)
    assert len(lines) > 1 and run(capsys, las_folder, wav, *options) == [f"{wav}: {' '.join(lines)}"]


def test_ctrl_c_ends_the_audio_and_not_the_words(streaming_folder, monkeypatch, capsys):
    def pieces(_):
        yield SAMPLES[:20000]
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "stdin_pieces", pieces)
    listening_to(monkeypatch, b"")
    *_, last = run(capsys, streaming_folder, "-", "--pause", "60")
    assert last == SherpaStreaming(open_folder(streaming_folder)).decode(SAMPLES[:20000])


def test_ctrl_c_in_a_file_ends_it_all(streaming_folder, wav, monkeypatch, capsys, caplog):
    def pieces(_):
        yield SAMPLES[:20000]
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "file_pieces", pieces)
    assert transcribe.main([str(streaming_folder), str(wav), str(wav)]) == 130
    assert capsys.readouterr().out == caplog.text == ""


def test_stdin_without_words_says_what_was_heard(streaming_folder, monkeypatch, capsys, caplog):
    listening_to(monkeypatch, as_pcm(SAMPLES))
    assert run(capsys, streaming_folder, "-", "--pause", "0.08") and caplog.text == ""
    monkeypatch.setattr(SherpaStream, "text", lambda stream: "")  # this model hears words in silence, too
    listening_to(monkeypatch, as_pcm(SAMPLES))
    assert run(capsys, streaming_folder, "-") == []
    assert "stdin: 2.5 s were heard, and no words" in caplog.text


def test_a_line_on_a_terminal_is_written_anew(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    out.isatty = lambda: True
    printer = transcribe.Printer(out, True)
    for text in ("turn", "turn", "turn on the light in the kitchen"):
        printer.partial("a: ", text)
    printer.final("a: ", "turn on the light in the kitchen")
    before, *shown = out.getvalue().split("\r")
    assert (before, shown[:2]) == ("", ["a: turn\x1b[K", "ight in the kitchen\x1b[K"]), "19 columns fit"
    assert shown[2:] == ["a: turn on the light in the kitchen\x1b[K\n"]
    printer.clear()
    printer.partial("b: ", "turn")
    printer.clear()
    printer.partial("c: ", "turn")
    assert out.getvalue().split("\n")[1] == "\rb: turn\x1b[K\r\x1b[K\rc: turn\x1b[K"


# ---------------------------------------------------------------- what is refused


def refusal(*args):
    with pytest.raises(UserError) as raised:
        transcribe.main([str(arg) for arg in args])
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_audio_that_cannot_be_heard_is_named_before_any_is(streaming_folder, wav, capsys, tmp_path):
    stereo = np.stack([SAMPLES, SAMPLES], axis=1)
    (tmp_path / "zero.wav").touch()
    (tmp_path / "text.wav").write_text("no audio at all " * 20)
    raw = [tmp_path / f"a.{suffix}" for suffix in ("raw", "pcm", "s16", "s16le", "PCM")]
    for path in raw:
        path.write_bytes(as_pcm(SAMPLES))
    for path, problem in (
        (written(tmp_path / "8 k.wav", rate=8000), "has 8000 Hz, and the model hears 16000 Hz"),
        (written(tmp_path / "stereo.wav", stereo), "has 2 channels, and the model hears one"),
        (tmp_path / "text.wav", "cannot be read as audio"),
        (written(tmp_path / "header.wav", SAMPLES[:0]), "it has a header and no samples"),
        (tmp_path / "zero.wav", "is empty (0 bytes)"),
        (tmp_path / "gone.wav", "no such file"),
        (tmp_path, "is a folder"),
        (".", "is a folder"),
        ("/dev/null", "is no file"),
        *((path, f"raw PCM is heard from stdin: give - instead, and < {path}") for path in raw),
    ):
        message = refusal(streaming_folder, wav, path)
        assert str(path) in message and problem in message
        name = Path(path).name
        assert ("ffmpeg -i " in message) == (name in ("8 k.wav", "stereo.wav", "text.wav")), message
        if name == "8 k.wav":
            assert f"ffmpeg -i '{path}' -ar 16000 -ac 1 '{tmp_path / '8 k.16k.wav'}'" in message
    assert capsys.readouterr().out == ""


def test_a_damaged_file_leaves_the_others_alone(las_folder, wav, tmp_path, capsys, caplog):
    numberless = SAMPLES.copy()
    numberless[30000] = np.nan
    bad, flac = written(tmp_path / "nan.wav", numberless), written(tmp_path / "cut.flac")
    flac.write_bytes(flac.read_bytes()[:-20000])
    for args in ([], ["--mode", "offline"], ["--two-pass"]):
        caplog.clear()
        assert transcribe.main([str(arg) for arg in (las_folder, bad, flac, wav, *args)]) == 1
        assert re.fullmatch(f"{re.escape(str(wav))}: .+\n", capsys.readouterr().out)
        errors = [record.getMessage() for record in caplog.records]
        assert len(errors) == 2 and "nan.wav holds samples that are no numbers" in errors[0]
        assert "cut.flac is damaged: it breaks off after" in errors[1]


def test_a_long_file_is_not_heard_whole_without_a_word(
    las_folder, offline_folder, wav, capsys, caplog, monkeypatch
):
    assert 10 < transcribe.LONGEST_LEARNT_S < 100
    monkeypatch.setattr(transcribe, "LONGEST_LEARNT_S", 2)
    short = written(wav.with_name("b.wav"), SAMPLES[:30000])
    for folder, args, mend in (
        (las_folder, ["--mode", "offline"], "; use --mode streaming"),
        (las_folder, ["--mode", "offline", "--two-pass"], "; use --mode streaming"),
        (offline_folder, [], "; cut it at its pauses"),
        (las_folder, [], None),
    ):
        caplog.clear()
        assert len(run(capsys, folder, wav, short, "--final-only", *args)) == 2
        warnings = [record.getMessage() for record in caplog.records]
        if mend is None:
            assert warnings == []
        else:
            (warning,) = warnings
            assert warning.startswith(f"{wav} is heard as one utterance of 2.5 s") and warning.endswith(mend)


def test_what_does_not_fit_into_memory_is_named(las_folder, wav, capsys, caplog, monkeypatch):
    class OnnxruntimeError(Exception):
        __module__ = "onnxruntime.capi.onnxruntime_pybind11_state"

    short = written(wav.with_name("b.wav"), SAMPLES[:30000])
    for error in (RuntimeError("Failed to allocate"), MemoryError(), OnnxruntimeError("Failed")):

        class Recogniser(SherpaOffline):
            def decode(self, samples, error=error):
                if len(samples) > 30000:
                    raise error
                return super().decode(samples)

        monkeypatch.setattr(transcribe, "SherpaOffline", Recogniser)
        caplog.clear()
        assert transcribe.main([str(las_folder), str(wav), str(short), "--mode", "offline"]) == 1
        assert capsys.readouterr().out.startswith(f"{short}: ")
        assert f"{wav} (2.5 s) could not be heard whole" in caplog.text
        assert f"use --mode streaming ({one_line(error)})" in caplog.text
    error = ValueError("a mistake of ours")
    monkeypatch.setattr(SherpaOffline, "decode", lambda *_: exec("raise error", {"error": error}))
    monkeypatch.setattr(transcribe, "SherpaOffline", SherpaOffline)
    with pytest.raises(ValueError, match="of ours"):
        transcribe.main([str(las_folder), str(wav), "--mode", "offline"])


def test_stdin_that_cannot_be_heard(streaming_folder, offline_folder, wav, monkeypatch, capsys, caplog):
    listening_to(monkeypatch, wav.read_bytes(), step=1)
    assert transcribe.main([str(streaming_folder), "-", str(wav)]) == 1
    assert "stdin holds a file (WAV)" in caplog.text and capsys.readouterr().out.startswith(f"{wav}: ")
    assert "stdin is heard as it comes" in refusal(offline_folder, "-")
    assert refusal(streaming_folder, "-", "--mode", "offline").endswith("or leave --mode out")
    listening_to(monkeypatch, b"", is_terminal=True)
    assert "stdin is a terminal" in refusal(streaming_folder, "-")


def test_closed_stdin_and_stdout(streaming_folder, wav, monkeypatch):
    """`<&-` and `>&-` of a shell."""
    monkeypatch.setattr("sys.stdin", None)
    assert "stdin is closed; send audio there" in refusal(streaming_folder, "-")
    monkeypatch.setattr("sys.stdout", None)
    assert "stdout is closed" in refusal(streaming_folder, wav)


def test_models_that_cannot_run(streaming_folder, offline_folder, wav, tmp_path):
    assert "there is no model folder" in refusal(tmp_path / "gone", wav)
    assert "has no model.json" in refusal(wav.parent, wav)
    assert "has no mode streaming; it has offline" in refusal(offline_folder, wav, "--mode", "streaming")
    assert "has no second pass" in refusal(offline_folder, wav, "--two-pass")
    copy = shutil.copytree(streaming_folder, tmp_path / "copy")
    joiner = (copy / "joiner.onnx").read_bytes()
    (copy / "joiner.onnx").write_bytes(joiner[:-1] + b"x")
    assert "joiner.onnx is not the file that was exported" in refusal(copy, wav)
    (copy / "joiner.onnx").unlink()
    assert "joiner.onnx is missing" in refusal(copy, wav)
    broken = without_metadata(streaming_folder, tmp_path / "broken", "encoder-streaming", "left_context")
    assert "has no metadata left_context" in refusal(broken.path, wav)


def test_options_that_make_no_sense(las_folder, capsys):
    cpus = os.cpu_count()
    for args, problem in (
        (["a.wav", "--two-pass", "--decoding-method", "greedy_search"], "leave --decoding-method out"),
        (["-", "a.wav", "-"], "stdin (-) can be heard once"),
        (["-", "--pause", "-1"], "--pause must be a number of seconds greater than 0"),
        (["-", "--pause", "inf"], "--pause must be a number of seconds greater than 0"),
        (["-", "--pause", "nan"], "--pause must be a number of seconds greater than 0"),
        (["-", "--num-threads", "0"], f"--num-threads must be from 1 to {cpus}"),
        (["-", "--num-threads", f"{cpus + 1}"], f"--num-threads must be from 1 to {cpus}"),
    ):
        with pytest.raises(SystemExit):
            transcribe.main([str(las_folder), *args])
        assert problem in capsys.readouterr().err
