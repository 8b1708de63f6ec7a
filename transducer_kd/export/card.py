"""The model card: README.md of a model folder, for whoever finds the folder without the project."""

from typing import Any, Dict, List, Optional

from transducer_kd.export.folder import ModelFolder
from transducer_kd.log import atomic_write

_FRAME_MS = 40  # of an encoder frame
_SYNTHETIC = "**Synthetic speech, in training and test: not comparable with figures of real speech.**"
_NAMES = {"pytorch": "PyTorch", "chunks": "PyTorch, by chunks", "onnx": "float", "int8": "int8"}


def write_card(folder: ModelFolder, gate: Optional[Dict[str, Any]]) -> None:
    """Write README.md. gate: what parity.check found; None: the gate was left out."""
    with atomic_write(folder.path / "README.md") as f:
        f.write("\n".join(_lines(folder, gate)) + "\n")


def _lines(folder: ModelFolder, gate: Optional[Dict[str, Any]]) -> List[str]:
    info = folder.info
    return [
        f"# Speech recogniser {info['phase']} ({info['recipe']}, {info['scale']})",
        "",
        f"A conformer transducer for 16 kHz mono speech, trained on {info['corpus']}, as ONNX files for "
        f"sherpa-onnx. {_how_it_hears(info)}",
        "",
        "    python -m transducer_kd.export.transcribe MODEL_DIR file.wav",
        "",
        "## Sizes",
        "",
        f"{info['params_first_pass']:,} parameters in the first pass, {info['params_deployed']:,} in all.",
        "",
        "| files | float, MB | int8, MB |",
        "|---|---|---|",
        *_size_rows(folder),
        "",
        "## Word error rates",
        "",
        *([_SYNTHETIC, ""] if info["corpus"].startswith("synthetic") else []),
        *_gate_lines(gate),
        "",
        "## Where it is from",
        "",
        f"- weights: {info['checkpoint']}; sha256 of model.safetensors "
        f"{info['files']['model.safetensors']['sha256']}",
        f"- BPE model: {info['vocab_size']} pieces, sha256 {info['bpe_sha256']}",
        f"- code: commit {info['commit']}, torch {info['torch']}",
        f"- command: `{info['command']}`",
        "",
        "model.json has the sha256 of every file.",
    ]


def _how_it_hears(info: Dict[str, Any]) -> str:
    if not info["chunk_size"]:
        return "It hears whole utterances."
    chunk_ms, past_ms = (_FRAME_MS * info[name] for name in ("chunk_size", "left_context"))
    return (
        f"It streams in chunks of {chunk_ms} ms and looks back {past_ms} ms before each. It has learnt "
        "single utterances: begin a new stream after a pause, since one that goes on loses the first words."
    )


def _size_rows(folder: ModelFolder) -> List[str]:
    rows = [(mode, mode, False) for mode in folder.modes]
    if folder.has_las:
        rows += [(f"{mode}, two passes", mode, True) for mode in folder.modes]
    return [
        f"| {name} | "
        + " | ".join(f"{folder.bytes(mode, precision, las) / 1e6:.2f}" for precision in ("float", "int8"))
        + " |"
        for name, mode, las in rows
    ]


def _gate_lines(gate: Optional[Dict[str, Any]]) -> List[str]:
    if gate is None:
        return ["Not measured: the export was made with --skip-gate."]
    verdict = "The parity gate is passed." if gate["passed"] else "**The parity gate is NOT passed.**"
    lines = [
        f"Through {gate['runtime']}; two passes through onnxruntime. Identical: share of the utterances "
        f"whose words are those of PyTorch. {verdict}",
        "",
        "| test set | mode | passes | files | WER, % | 95% interval | identical, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in gate["words"]:
        name, passes = _NAMES[row["implementation"]], 2 if row["two_pass"] else 1
        interval = f"{row['wer_low']:.2f} to {row['wer_high']:.2f}"
        lines.append(
            f"| {row['test_set']} | {row['mode']} | {passes} | {name} | {row['wer']:.2f} | {interval} "
            f"| {100 * row['identical_share']:.1f} |"
        )
    return lines
