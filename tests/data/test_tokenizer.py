import hashlib

import pytest

from transducer_kd.data.tokenizer import Tokenizer, check_same_tokenizer, train_bpe
from transducer_kd.log import UserError

LINES = ["TURN ON THE LIGHTS", "TURN OFF THE MUSIC", "SET A TIMER FOR TEN MINUTES", "IT'S TEN O'CLOCK"]


@pytest.fixture(scope="module")
def lang_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lang")
    train_bpe(LINES, folder, 40)
    return folder


def test_special_symbols_have_icefalls_ids(lang_dir):
    symbols = [line.split() for line in (lang_dir / "tokens.txt").read_text().splitlines()]
    assert symbols[:3] == [["<blk>", "0"], ["<sos/eos>", "1"], ["<unk>", "2"]]
    assert [int(number) for _, number in symbols] == list(range(40))
    assert Tokenizer(lang_dir).vocab_size == 40


def test_round_trip_and_unknown_characters(lang_dir):
    tokenizer = Tokenizer(lang_dir)
    ids = tokenizer.encode(LINES + [""])
    assert [tokenizer.decode(i) for i in ids] == LINES + [""]
    assert all(3 <= token < 40 for i in ids for token in i)
    assert 2 in tokenizer.encode(["QÜ"])[0]
    assert tokenizer.decode([0, 1] + ids[0] + [0]) == LINES[0]


def test_the_same_text_gives_the_same_bytes_and_the_hash_names_them(lang_dir, tmp_path):
    again = train_bpe(LINES, tmp_path, 40)
    content = (lang_dir / "bpe.model").read_bytes()
    assert (tmp_path / "bpe.model").read_bytes() == content
    assert again.sha256 == hashlib.sha256(content).hexdigest() == Tokenizer(lang_dir).sha256


def test_too_large_a_vocabulary_names_the_largest_possible_one_which_works(tmp_path):
    with pytest.raises(UserError, match="at most (\\d+) pieces") as error:
        train_bpe(LINES, tmp_path, 500)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert train_bpe(LINES, tmp_path, largest).vocab_size == largest
    with pytest.raises(UserError, match=f"at most {largest} pieces"):
        train_bpe(LINES, tmp_path, largest + 1)


def test_too_small_a_vocabulary_names_the_smallest_possible_one_which_works(tmp_path):
    with pytest.raises(UserError, match="at least (\\d+) pieces") as error:
        train_bpe(LINES, tmp_path, 5)
    smallest = int(str(error.value).split("at least ")[1].split()[0])
    assert train_bpe(LINES, tmp_path, smallest).vocab_size == smallest


def test_no_text_at_all(tmp_path):
    with pytest.raises(UserError, match="every transcript is empty"):
        train_bpe(["", "  "], tmp_path, 40)


def test_another_model_is_refused_by_its_hash(lang_dir, tmp_path):
    other = train_bpe(LINES[:3], tmp_path, 30)
    check_same_tokenizer(other.sha256, tmp_path)
    with pytest.raises(UserError) as error:
        check_same_tokenizer(other.sha256, lang_dir)
    message = str(error.value)
    assert (
        other.sha256[:12] in message
        and Tokenizer(lang_dir).sha256[:12] in message
        and str(lang_dir) in message
    )


def test_missing_and_foreign_models(tmp_path):
    with pytest.raises(UserError, match="prepare_lang"):
        Tokenizer(tmp_path)
    (tmp_path / "bpe.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(tmp_path)
