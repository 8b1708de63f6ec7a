"""An export is written beside the one whose place it is to take, so that neither is ever half there."""

import shutil
from pathlib import Path

import pytest

from tests.export.conftest import tiny_model
from transducer_kd.export import write
from transducer_kd.export.folder import SCRATCH, open_folder
from transducer_kd.export.write import check_target, new_beside, put_in_place, set_aside, write_folder
from transducer_kd.log import UserError

ABOUT = {"phase": "small", "checkpoint": "epoch-1"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def old(las_folder, tmp_path):
    """An export that has passed its gate, and has been measured."""
    folder = shutil.copytree(las_folder, tmp_path / "exp/export")
    for name in ("gate.json", "bench.json", "README.md"):
        (folder / name).write_text("old")
    return folder


@pytest.fixture
def write_new(lang_dir):
    """Function: writes another export, one without chunks, for `path`; returns where it is."""
    model = tiny_model(40, chunk_size=0, num_layers=1)

    def run(path):
        return write_folder(new_beside(path), model, model, model.state_dict(), lang_dir, ABOUT)[0].path

    return run


@pytest.fixture
def killed(monkeypatch):
    """Function: runs put_in_place, which is killed before its rename number `num`, counted from 0."""

    def run(num, new, path):
        real, renames = Path.rename, []

        def rename(source, target):
            renames.append(source)
            if len(renames) > num:
                raise KeyboardInterrupt
            return real(source, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "rename", rename)
            put_in_place(new, path)

    return run


def test_a_new_export_takes_the_place_of_the_old_one_of_which_nothing_stays(old, write_new):
    (old / f"{SCRATCH}of-a-search-that-was-killed").mkdir()
    (old / ".bench.json.abc.tmp").write_text("half")
    before = content(old)
    new = write_new(old)
    assert content(old) == before, "until it is in place"
    put_in_place(new, old)
    assert {path.name for path in old.iterdir()} == {*open_folder(old).info["files"], "model.json"}
    assert open_folder(old).modes == ("offline",)
    assert [path.name for path in old.parent.iterdir()] == ["export"]


def test_what_somebody_put_into_the_folder_stays_there(old, write_new):
    (old / "hello.wav").write_text("mine")
    (old / "notes").mkdir()
    put_in_place(write_new(old), old)
    assert (old / "hello.wav").read_text() == "mine" and (old / "notes").is_dir()


def test_the_first_export(write_new, tmp_path):
    path = tmp_path / "a/b/export"
    put_in_place(write_new(path), path)
    open_folder(path)
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["export"]


def test_a_link_to_a_folder_elsewhere_stays_one(old, write_new, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    put_in_place(write_new(link), link)
    assert link.is_symlink() and open_folder(old).modes == ("offline",)


def test_an_export_that_is_killed_leaves_the_old_one_and_the_next_clears_away(old, write_new, monkeypatch):
    before = content(old)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(write, "safetensors_bytes", interrupted)
        write_new(old)
    assert content(old) == before
    (half,) = old.parent.glob(".export.new")
    (half / ".encoder-offline.onnx.abc.tmp").write_text("half")
    put_in_place(write_new(old), old)
    assert {path.name for path in old.iterdir()} == {*open_folder(old).info["files"], "model.json"}


def interrupted(*_):
    raise KeyboardInterrupt


def test_killed_between_the_renames_the_old_one_comes_back(old, write_new, killed):
    before = content(old)
    killed(1, write_new(old), old)
    assert not old.exists() and content(old.parent / ".export.old") == before
    new = new_beside(old)
    assert content(old) == before and not content(new)
    assert sorted(path.name for path in old.parent.iterdir()) == [".export.new", "export"]


def test_killed_after_the_renames_the_new_one_is_there(old, write_new, killed):
    (old / "hello.wav").write_text("mine")
    killed(2, write_new(old), old)
    assert open_folder(old).modes == ("offline",) and not (old / "hello.wav").exists()
    new_beside(old)
    assert open_folder(old).modes == ("offline",) and (old / "hello.wav").read_text() == "mine"
    assert sorted(path.name for path in old.parent.iterdir()) == [".export.new", "export"]


def test_what_is_set_aside_is_the_last_and_goes_when_one_is_good(old, write_new):
    before = content(old)
    for verdict in ("first", "second"):
        new = write_new(old)
        (new / "gate.json").write_text(verdict)
        failed = set_aside(new, old)
    assert failed == old.parent / "export.failed" and (failed / "gate.json").read_text() == "second"
    assert content(old) == before
    put_in_place(write_new(old), old)
    assert [path.name for path in old.parent.iterdir()] == ["export"]


@pytest.mark.parametrize("name", ["README.md", "photo.jpg", ".ssh"])
def test_the_folder_of_something_else_is_not_touched(name, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    for refuse in (check_target, new_beside):
        with pytest.raises(
            UserError, match=f"mine is no model folder and has a {name}; name a folder of its"
        ):
            refuse(folder)
    assert content(folder) == {name: b"mine"} and [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="is a file; name a folder"):
        check_target(folder / name)


def test_what_a_killed_export_of_an_earlier_version_left_can_be_written_over(tmp_path, write_new):
    """It cleared the folder itself, and wrote there."""
    path = tmp_path / "export"
    (path / f"{SCRATCH}search").mkdir(parents=True)
    (path / "joiner.onnx").write_text("half")
    put_in_place(write_new(path), path)
    assert {file.name for file in path.iterdir()} == {*open_folder(path).info["files"], "model.json"}


def test_missing_tokens(tmp_path):
    model = tiny_model(40, num_layers=1)
    with pytest.raises(UserError, match="tokens.txt is missing.*run stage 1 again"):
        write_folder(tmp_path / "model", model, model, model.state_dict(), tmp_path, {})
    assert not (tmp_path / "model" / "model.json").exists()
