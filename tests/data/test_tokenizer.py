import hashlib

import pytest
import sentencepiece

from transducer_kd.data.tokenizer import Tokenizer, check_same_tokens, import_bpe, train_bpe
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


def test_a_model_from_elsewhere_makes_the_same_lang_folder(lang_dir, tmp_path):
    taken = import_bpe(lang_dir / "bpe.model", tmp_path / "lang", 40)
    assert taken.sha256 == Tokenizer(lang_dir).sha256
    for name in ("tokens.txt", "bpe.vocab"):
        assert (tmp_path / "lang" / name).read_bytes() == (lang_dir / name).read_bytes()


def test_a_model_from_elsewhere_that_does_not_fit_leaves_the_folder_as_it_was(lang_dir, tmp_path):
    """And the error does not send the user to train another one."""
    other, lang = tmp_path / "other.model", tmp_path / "lang"
    train_bpe(LINES, lang, 38)
    before = {path.name: path.read_bytes() for path in lang.iterdir()}

    def refused(*words):
        with pytest.raises(UserError) as error:
            import_bpe(other, lang, 38)
        assert all(word in str(error.value) for word in (str(other), *words)), str(error.value)
        assert {path.name: path.read_bytes() for path in lang.iterdir()} == before
        return str(error.value)

    missing = refused("cannot be read", "name the bpe.model that the teacher was trained with")
    other.write_bytes(b"not a model")
    broken = refused("is not a sentencepiece model", "name the bpe.model")
    with other.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=f, vocab_size=38, model_type="bpe", minloglevel=2
        )
    foreign = refused("begins with <unk> <s> </s> and not", "with <blk> <sos/eos> <unk>; name the bpe.model")
    assert not any("prepare_lang" in message for message in (missing, broken, foreign))
    other.write_bytes((lang_dir / "bpe.model").read_bytes())
    refused("has 40 pieces, not 38; say --vocab-size 40")


def test_the_program_takes_a_model_and_warns_where_it_replaces_another(lang_dir, tmp_path, run_program):
    def make(*options):
        outcome = run_program("prepare_lang", "--lang-dir", tmp_path / "lang", *options)
        assert outcome.status == 0, outcome.lines
        return "held another model" in " ".join(outcome.lines)

    (tmp_path / "text").write_text("\n".join(LINES[:2]))
    train = ("--text", tmp_path / "text", "--vocab-size", 24)
    take = ("--bpe-model", lang_dir / "bpe.model", "--vocab-size", 40)
    replaced = [make(*options) for options in (train, train, take, take, train)]
    assert replaced == [False, False, True, False, True]
    assert Tokenizer(tmp_path / "lang").vocab_size == 24
    wrong = run_program("prepare_lang", "--lang-dir", tmp_path / "lang", *take[:-1], 39)
    assert (wrong.status, len(wrong.lines)) == (1, 1) and "say --vocab-size 40" in wrong.lines[0]
    assert Tokenizer(tmp_path / "lang").vocab_size == 24


def test_missing_and_foreign_models(tmp_path):
    with pytest.raises(UserError, match="prepare_lang"):
        Tokenizer(tmp_path)
    (tmp_path / "bpe.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer(tmp_path)


@pytest.fixture
def token_files(lang_dir, tmp_path):
    """Our tokens.txt and a way to write another one."""
    own = lang_dir / "tokens.txt"

    def write(text):
        other = tmp_path / "tokens.txt"
        other.write_bytes(text if isinstance(text, bytes) else text.encode())
        return other

    return own, own.read_text().splitlines(), write


def test_the_same_tokens_pass_with_disambiguation_symbols_in_any_order_and_tabs(token_files):
    own, lines, write = token_files
    check_same_tokens(own, own)
    check_same_tokens(own, write("\n".join(lines + ["#0 40", "#1 41", ""])))
    check_same_tokens(own, write("\r\n".join(line.replace(" ", "\t") for line in lines[::-1])))


def test_a_symbol_that_is_a_line_separator_is_a_symbol(token_files):
    write = token_files[2]
    odd = write("<blk> 0\n\u2028 1\n\u3000 2\n#1 3\nA 4\n")
    check_same_tokens(odd, odd)
    own = odd.rename(odd.with_name("own.txt"))
    with pytest.raises(UserError, match="at id 3: #1 and #2 "):  # not at the end, so a token
        check_same_tokens(own, write("<blk> 0\n\u2028 1\n\u3000 2\n#2 3\nA 4\n"))


def test_the_first_different_token_is_named(token_files):
    own, lines, write = token_files
    symbol = lines[7].split()[0]
    other = write("\n".join(lines[:7] + ["QQ 7", "ZZ 8"] + lines[9:]))
    with pytest.raises(UserError) as error:
        check_same_tokens(own, other)
    message = str(error.value)
    assert f"id 7: {symbol} and QQ " in message and str(own) in message and str(other) in message


def test_another_number_of_tokens(token_files):
    own, lines, write = token_files
    with pytest.raises(UserError, match="id 40: no token and X .40 and 41 tokens"):
        check_same_tokens(own, write("\n".join(lines + ["X 40"])))
    with pytest.raises(UserError, match="id 39: .* and no token .40 and 39 tokens"):
        check_same_tokens(own, write("\n".join(lines[:39])))


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "has no tokens"),
        ("#0 0\n", "has no tokens"),
        ("<blk> 0\n<sos/eos>\n", ":2: '<sos/eos>' is no"),
        ("<blk> 0\nA 1\nB 1\n", ":3: 'B 1' is no"),
        ("<blk> 0\nA one\n", ":2: 'A one' is no"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_damaged_token_lists(token_files, content, words):
    own, _, write = token_files
    with pytest.raises(UserError, match=words):
        check_same_tokens(own, write(content))


def test_a_missing_token_list(token_files, tmp_path):
    with pytest.raises(UserError, match="nowhere.txt cannot be read"):
        check_same_tokens(token_files[0], tmp_path / "nowhere.txt")
