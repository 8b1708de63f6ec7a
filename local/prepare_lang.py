#!/usr/bin/env python3
"""Stage 1: a BPE model from training transcripts, or one trained elsewhere -> LANG_DIR/bpe.model, bpe.vocab,
tokens.txt.

<blk> is 0, <sos/eos> 1, <unk> 2. The same text and size give the same files; nothing is done when they are
there.
"""

import argparse
import gzip
import hashlib
import json
import logging
import lzma
import sys
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.log import UserError, one_line, run_main, setup_logging, write_json  # noqa: E402

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lang-dir", type=Path, required=True, help="where the model goes, e.g. data/lang_bpe_500"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, special symbols included")
    parser.add_argument("--manifests-dir", type=Path, help="what local/prepare_manifests.py wrote")
    parser.add_argument(
        "--parts", nargs="+", default=[], metavar="PART", help="labelled training parts to learn from"
    )
    parser.add_argument(
        "--text", nargs="+", type=Path, default=[], help="more text, a sentence a line (.gz, .xz too)"
    )
    parser.add_argument(
        "--kaldi-text", nargs="+", type=Path, default=[], help="the same with an utterance id in front"
    )
    parser.add_argument(
        "--text-norm", choices=("upper", "none"), default="upper", help="of --text and --kaldi-text"
    )
    parser.add_argument(
        "--bpe-model", type=Path, help="take this sentencepiece model, such as a teacher's, and train none"
    )
    return parser.parse_args(argv)


def read_texts(args: argparse.Namespace) -> Iterator[str]:
    """Transcripts of all sources, normalised as the manifests are."""
    # Late: --help and a mistyped option should answer at once.
    from transducer_kd.data.manifests import read_prepared
    from transducer_kd.data.validate import normalize_text

    for part in args.parts:
        if args.manifests_dir is None:
            raise UserError("--parts needs --manifests-dir")
        yield from (s.text or "" for s in read_prepared("supervisions", args.manifests_dir, part))
    for path in args.text + args.kaldi_text:
        try:
            with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as f:
                for line in f:
                    text = line.partition(" ")[2] if path in args.kaldi_text else line
                    yield normalize_text(text, args.text_norm)
        except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as e:
            raise UserError(f"text file {path} cannot be read: {one_line(e)}") from None


def read_mark(path: Path) -> Any:
    """What an earlier run said in lang.json. UserError when that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # of the text's encoding, too
        raise UserError(
            f"{path} is damaged ({one_line(e)}); delete it and run this again: the same text gives the same "
            "bpe.model"
        ) from None


def sha256_of_model(lang_dir: Path) -> str:
    """sha256 of the bpe.model in a lang folder; empty where there is none."""
    path = lang_dir / "bpe.model"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def report(lang_dir: Path, tokenizer: Any, source: str, before: str) -> None:
    """Say what was made; before: the sha256 of the model that was there."""
    if before not in ("", tokenizer.sha256):
        logging.warning(
            "%s held another model; what was trained with that needs it and will refuse this one", lang_dir
        )
    logging.info(
        "%s: %d pieces from %s, sha256 %s", lang_dir, tokenizer.vocab_size, source, tokenizer.sha256[:12]
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    setup_logging()
    from transducer_kd.data.tokenizer import import_bpe, train_bpe

    before, mark = sha256_of_model(args.lang_dir), args.lang_dir / "lang.json"
    if args.bpe_model:
        tokenizer = import_bpe(args.bpe_model, args.lang_dir, args.vocab_size)
        mark.unlink(missing_ok=True)  # what another model here was made from
        report(args.lang_dir, tokenizer, str(args.bpe_model), before)
        return 0
    if not (args.parts or args.text or args.kaldi_text):
        raise UserError("nothing to learn from: pass --manifests-dir with --parts, --text or --kaldi-text")
    texts: List[str] = list(read_texts(args))
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    wanted = {"vocab_size": args.vocab_size, "text_sha256": digest}
    if before and mark.exists() and read_mark(mark) == {**wanted, "sha256": before}:
        logging.info("%s is up to date", args.lang_dir)
        return 0
    tokenizer = train_bpe(texts, args.lang_dir, args.vocab_size)
    write_json(mark, {**wanted, "sha256": tokenizer.sha256})
    report(args.lang_dir, tokenizer, f"{len(texts)} lines", before)
    return 0


if __name__ == "__main__":
    run_main(main)
