import dataclasses
import json
import math

import pytest

from transducer_kd.decode.records import Record, append_record, read_records
from transducer_kd.log import UserError


def record(**changes):
    values = {f.name: {"str": "x", "int": 1, "float": 2.5}.get(getattr(f.type, "__name__", f.type), None)
              for f in dataclasses.fields(Record)}  # fmt: skip
    return Record(**{**values, "parameters": {"beam_size": 4}, **changes})


def test_one_record_per_key_and_the_newest_stays(tmp_path):
    path = tmp_path / "exp" / "metrics.json"
    assert read_records(path) == []
    append_record(path, record(test_set="clean", wer=5.0))
    append_record(path, record(test_set="other", wer=9.0))
    append_record(path, record(test_set="clean", mode="streaming", wer=7.0))
    append_record(path, record(test_set="clean", wer=4.0))
    found = [(r["test_set"], r["mode"], r["wer"]) for r in read_records(path)]
    assert found == [("other", "x", 9.0), ("clean", "streaming", 7.0), ("clean", "x", 4.0)]
    assert json.loads(path.read_text())[0]["parameters"] == {"beam_size": 4}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_fields_the_reports_read():
    needed = (
        "recipe corpus scale phase mode params_deployed bytes index_bytes params_dense params_layers "
        "test_set method parameters wer wer_low "
        "wer_high errors ref_words audio_s decode_s second_pass_s recogs commit command"
    ).split()
    assert set(needed) <= {f.name for f in dataclasses.fields(Record)}


def test_damaged_files_are_named_and_kept(tmp_path):
    path = tmp_path / "metrics.json"
    for content, problem in (
        ("[{", "not valid JSON"),
        ('{"a": 1}', "not a list of records"),
        ("[1]", "not a list"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=f"metrics.json.*{problem}"):
            append_record(path, record())
        assert path.read_text() == content


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="wer_high"):
        append_record(tmp_path / "metrics.json", record(wer_high=math.inf))
    assert not (tmp_path / "metrics.json").exists()
