"""What a program's user sees of errors: one line, and a status."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transducer_kd.config import load_config
from transducer_kd.log import atomic_write, run_main

ROOT = Path(__file__).resolve().parent.parent


def failing(error):
    def main():
        raise error

    return main


@pytest.fixture
def outcome(caplog):
    """outcome(main) -> (status, the one line)"""

    def run(main):
        with pytest.raises(SystemExit) as stopped:
            run_main(main)
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        return stopped.value.code, record.getMessage()

    return run


@pytest.mark.parametrize(
    "error, words",
    [
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x: Is a directory; name a file"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x/y"), "x/y: Not a directory; name a folder"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            "x: Permission denied; give yourself access",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "x"), "x: File exists; move it away"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: Read-only file system; "),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "no space left on the disk while writing x"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "no space left on the disk while writing x"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line(outcome, error, words):
    status, line = outcome(failing(error))
    assert status == 1 and line.startswith(words) and "\n" not in line


def test_a_folder_given_as_a_configuration(outcome, tmp_path):
    status, line = outcome(lambda: load_config(tmp_path))
    assert status == 1 and line == f"{tmp_path}: Is a directory; name a file"


def test_a_quota_that_is_used_up_while_writing_names_the_target(outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: failing(OSError(errno.EDQUOT, "Disk quota exceeded"))())

    def main():
        with atomic_write(tmp_path / "result.json") as f:
            f.write("{}")

    status, line = outcome(main)
    assert status == 1 and f"while writing {tmp_path / 'result.json'}" in line
    assert not list(tmp_path.iterdir())


def test_other_os_errors_keep_their_traceback():
    with pytest.raises(ConnectionRefusedError):
        run_main(failing(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_log_file_on_a_full_disk_does_not_bury_the_message():
    code = (
        "import logging; from pathlib import Path; from transducer_kd.log import *\n"
        "setup_logging(Path('/dev/full'))\n"
        "def main(): raise UserError('the one line')\n"
        "run_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.endswith("the one line\n"), done.stderr
