"""BPE tokens by sentencepiece, with icefall's special symbols: <blk> 0, <sos/eos> 1, <unk> 2.

A lang folder holds bpe.model (sentencepiece), bpe.vocab (pieces and scores) and tokens.txt (`symbol id`
lines, what sherpa-onnx reads). The sha256 of bpe.model names a vocabulary: a teacher and its student must
share it.
"""

import hashlib
import io
import re
from pathlib import Path
from typing import Dict, Iterable, List, Tuple

import sentencepiece as spm

from transducer_kd.log import UserError, atomic_write

BLANK_ID, SOS_EOS_ID, UNK_ID = 0, 1, 2
_SPECIAL = ["<blk>", "<sos/eos>", "<unk>"]


class Tokenizer:
    """Text <-> token ids of one lang folder.

    Raises UserError when bpe.model is missing, unreadable, or has other special symbols than ours.
    """

    def __init__(self, lang_dir: Path):
        self.path = Path(lang_dir) / "bpe.model"
        content, self.processor = _load(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self.processor.get_piece_size()

    def encode(self, texts: List[str]) -> List[List[int]]:
        """Token ids of each text; characters that the model has never seen become <unk>."""
        return self.processor.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: List[int]) -> str:
        """Text of one token sequence; blank and <sos/eos> print nothing."""
        return self.processor.decode([int(i) for i in ids if i not in (BLANK_ID, SOS_EOS_ID)])


def train_bpe(texts: Iterable[str], lang_dir: Path, vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` BPE pieces (special symbols included) from normalised `texts` and write the lang
    folder.

    The same texts give the same file, byte for byte. Raises UserError when there is no text, or when the
    texts cannot give that many or that few pieces (the message says what is possible).
    """
    lines = [text for text in texts if text.strip()]
    if not lines:
        raise UserError(f"no text to train {lang_dir}/bpe.model from: every transcript is empty")
    return _write(_train(lines, vocab_size, hard_limit=True), lang_dir)


def import_bpe(bpe_model: Path, lang_dir: Path, vocab_size: int) -> Tokenizer:
    """Write a lang folder from a BPE model that was trained elsewhere, such as icefall's: for its teacher.

    UserError, and nothing is written, where the file is missing, no sentencepiece model, or has other special
    symbols than ours or another number of pieces than `vocab_size`.
    """
    content, processor = _load(bpe_model, "name the bpe.model that the teacher was trained with")
    found = processor.get_piece_size()
    if found != vocab_size:
        raise UserError(f"{bpe_model} has {found} pieces, not {vocab_size}; say --vocab-size {found}")
    return _write(content, lang_dir)


def _load(
    path: Path, mend: str = "make it with local/prepare_lang.py"
) -> Tuple[bytes, spm.SentencePieceProcessor]:
    """Content and model of a bpe.model, with its special symbols checked. mend: what errors say to do."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        raise UserError(f"{path} cannot be read; {mend}") from None
    processor = spm.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        raise UserError(f"{path} is not a sentencepiece model; {mend}") from None
    first = [processor.id_to_piece(i) for i in range(min(len(_SPECIAL), processor.get_piece_size()))]
    if first != _SPECIAL:
        raise UserError(
            f"{path} begins with {' '.join(first)} and not, as icefall's, with {' '.join(_SPECIAL)}; {mend}"
        )
    return content, processor


def _write(model: bytes, lang_dir: Path) -> Tokenizer:
    lang_dir = Path(lang_dir)
    processor = spm.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    with atomic_write(lang_dir / "tokens.txt") as f:
        f.writelines(f"{piece} {i}\n" for i, piece in enumerate(pieces))
    with atomic_write(lang_dir / "bpe.vocab") as f:
        f.writelines(f"{piece}\t{processor.get_score(i):g}\n" for i, piece in enumerate(pieces))
    with atomic_write(lang_dir / "bpe.model", "wb") as f:  # last: its presence says the folder is complete
        f.write(model)
    return Tokenizer(lang_dir)


def check_same_tokens(own_tokens: Path, other_tokens: Path) -> None:
    """Raise UserError unless two tokens.txt give every id the same symbol.

    For a teacher of which there is no bpe.model. The disambiguation symbols #0, #1, ... that icefall's lexica
    append do not count: no model emits them. Also UserError for a file that is missing or damaged.
    """
    own, other = _read_tokens(own_tokens), _read_tokens(other_tokens)
    for i in sorted({**own, **other}):
        if own.get(i) != other.get(i):
            raise UserError(
                f"{own_tokens} and {other_tokens} differ first at id {i}: {own.get(i, 'no token')} and "
                f"{other.get(i, 'no token')} ({len(own)} and {len(other)} tokens). A student needs its "
                "teacher's tokens: give stage 1 its bpe.model (run.sh --bpe-model), or take another teacher"
            )


def _read_tokens(path: Path) -> Dict[int, str]:
    """Id -> symbol of a tokens.txt, without disambiguation symbols."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"{path} cannot be read; name the tokens.txt of the model") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; name the tokens.txt of the model") from None
    tokens: Dict[int, str] = {}
    # Not splitlines(): a symbol may be one of the characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        match = re.fullmatch(r"(.+?)[ \t]+([0-9]+)\r?", line)
        if match and int(match.group(2)) not in tokens:
            tokens[int(match.group(2))] = match.group(1)
        elif line.strip():
            raise UserError(f"{path}:{number}: {line[:80]!r} is no `symbol id` line with an id of its own")
    while tokens and re.fullmatch("#[0-9]+", tokens[max(tokens)]):
        del tokens[max(tokens)]
    if not tokens:
        raise UserError(f"{path} has no tokens; name the tokens.txt of the model")
    return tokens


def _train(lines: List[str], vocab_size: int, hard_limit: bool) -> bytes:
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            user_defined_symbols=["<blk>", "<sos/eos>"],
            unk_id=UNK_ID,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,  # bytes; longer lines would be left out silently
            hard_vocab_limit=hard_limit,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        smallest = 3 + len(set("".join(lines).replace(" ", "")) | {"\u2581"})
        if vocab_size < smallest:
            raise UserError(
                f"a BPE vocabulary of {vocab_size} is too small: the text has {smallest - 3} characters, so "
                f"at least {smallest} pieces are needed"
            ) from None
        limit = re.search(r"<= (\d+)", str(e))
        largest = int(limit.group(1)) if limit else _largest_vocabulary(lines, vocab_size)
        raise UserError(
            f"{len(lines)} lines of text are too few for a BPE vocabulary of {vocab_size}; at most "
            f"{largest} pieces are possible (--vocab-size {largest}), or give more text"
        ) from None
    return model.getvalue()


def _largest_vocabulary(lines: List[str], vocab_size: int) -> int:
    model = _train(lines, vocab_size, hard_limit=False)
    return spm.SentencePieceProcessor(model_proto=model).get_piece_size()
