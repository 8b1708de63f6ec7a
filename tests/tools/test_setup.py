"""tools/setup.sh with stand-ins for Python, pip, uv and nvidia-smi: nothing is downloaded or built."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# Plays an interpreter: knows its version, makes environments that hold a copy of itself, and writes down what
# pip is asked to do. Files in $FAKE tell it to be slow, or to fail.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-c "*ensurepip*) [[ $2 == *"!= '@VERSION@'"* ]] ;;
  "-c "*fcntl*) exec @REAL@ "$@" ;;
  "-c "*platform.machine*) echo py-torch@TORCH@-abi1-Linux-test ;;
  "-c "*"import torch, k2"*) [ ! -e "$FAKE/k2-fails" ] || { echo "No module named _k2" >&2; exit 1; } ;;
  "-c "*) exit 0 ;;
  "-m venv")
    for target; do :; done
    mkdir -p "$target/bin" && cp "$0" "$target/bin/python"; echo venv >>"$FAKE/calls" ;;
  "-m pip")
    case "$*" in
      *--version*) exit 0 ;;
      *" wheel "*)
        echo "wheel ${@: -1}" >>"$FAKE/calls"
        [ ! -e "$FAKE/build-fails" ] || { echo "no such header" >&2; exit 1; }
        while [ "$1" != -w ]; do shift; done
        touch "$2/fake.whl" ;;
      *--no-index*) echo "install wheel" >>"$FAKE/calls" ;;
      *--require-hashes*)
        [[ $* != *--force-reinstall* ]] || { echo "uninstall" >>"$FAKE/calls"; rm "$FAKE/k2-fails"; }
        [ ! -e "$FAKE/k2-is-of-another-machine" ] || touch "$FAKE/k2-fails"
        echo "install hashed" >>"$FAKE/calls" ;;
      *" -r "*)
        echo "install pins" >>"$FAKE/calls"
        [ ! -e "$FAKE/pip-fails" ] || { echo "no network" >&2; exit 1; }
        [ ! -e "$FAKE/pip-is-slow" ] || sleep "$(cat "$FAKE/pip-is-slow")" ;;
    esac ;;
  "- "*) cat >/dev/null ;;
esac
"""


class Sandbox:
    """A copy of tools/ in a folder of its own, and a PATH on which the stand-ins come first."""

    def __init__(self, root: Path):
        self.root, self.bin, self.fake = root / "project", root / "bin", root / "fake"
        shutil.copytree(ROOT / "tools", self.root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        for folder in (self.bin, self.fake, root / "home"):
            folder.mkdir()
        self.environ = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(root / "home"),
            "PYENV_ROOT": str(root / "pyenv"),
            "FAKE": str(self.fake),
        }
        self.add("uv", '[ "$1" = --version ]')
        self.add_disk(free_gb=100)

    def add(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body if body.startswith("#!") else f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return path

    def add_disk(self, free_gb: int) -> None:
        """A disk of its own: how much is free on the machine that runs the tests is no part of them."""
        self.add("df", f"echo Filesystem; echo fake 0 0 {free_gb * 1024 * 1024} 0% /")

    def add_python(self, version: str, name: str = "") -> Path:
        text = FAKE_PYTHON.replace("@VERSION@", version).replace("@REAL@", sys.executable)
        text = text.replace("@TORCH@", "1.13.1" if version == "3.10" else "2.13.0")
        return self.add(name or f"python{version}", text)

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.root / "tools" / "setup.sh"), *arguments],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def setup(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == status, output
        return output

    def calls(self) -> list:
        """What the stand-ins were asked to do since the last look."""
        path = self.fake / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def wait_for_call(self, line: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.fake / "calls").exists() or line not in (self.fake / "calls").read_text():
            assert time.monotonic() < deadline, f"'{line}' did not come"
            time.sleep(0.02)


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def pin(env: str, name: str) -> str:
    text = (ROOT / "tools" / f"requirements-{env}.txt").read_text()
    return next(line.split()[-1] for line in text.splitlines() if name in line and "==" in line)


def test_first_call_makes_the_environment_and_the_second_does_nothing(sandbox):
    sandbox.add_python("3.10")
    built = [f"wheel {pin('k2', 'kaldifeat')}", "install wheel"]
    sandbox.setup()
    assert sandbox.calls() == ["venv", "install pins", "install hashed", *built]
    assert (sandbox.root / ".venv-default").read_text() == "k2\n"
    start = time.monotonic()
    assert sandbox.setup() == ""
    assert sandbox.setup("--env", "k2") == ""
    assert time.monotonic() - start < 2
    assert sandbox.calls() == []


def test_a_changed_pin_is_installed_into_the_same_environment(sandbox):
    sandbox.add_python("3.10")
    sandbox.setup()
    sandbox.calls()
    pins = sandbox.root / "tools" / "requirements-k2.txt"
    pins.write_text(pins.read_text() + "another==1.0\n")
    sandbox.setup()
    assert sandbox.calls() == ["install pins", "install hashed"]


def test_k2_is_chosen_by_its_hash_and_has_to_import(sandbox):
    """Of one version there are wheels for five Pythons, all tagged for any."""
    lines = (ROOT / "tools/requirements-k2.txt").read_text().splitlines()
    assert not [line for line in lines if line.startswith("k2")]
    sandbox.add_python("3.10")
    (sandbox.fake / "k2-fails").touch()
    sandbox.setup("--no-kaldifeat")
    assert sandbox.calls() == ["venv", "install pins", "uninstall", "install hashed"]
    wanted = (sandbox.root / ".venv/.hashed.txt").read_text().split()
    assert wanted[0] == "k2==1.23.4" and wanted[1].startswith("--hash=sha256:") and len(wanted) == 2


def test_a_k2_that_does_not_import_is_an_error(sandbox):
    sandbox.add_python("3.10")
    (sandbox.fake / "k2-is-of-another-machine").touch()
    output = sandbox.setup("--no-kaldifeat", status=1)
    assert "No module named _k2" in output and "k2 was installed but does not import here" in output
    assert "--env modern" in output and not (sandbox.root / ".venv/.setup-stamp").exists()


def test_wheels_are_kept_for_the_next_clone(sandbox, tmp_path):
    sandbox.add_python("3.10")
    sandbox.setup()
    sandbox.calls()
    shutil.rmtree(sandbox.root / ".venv")
    sandbox.setup()
    assert sandbox.calls() == ["venv", "install pins", "install hashed", "install wheel"]


def test_a_killed_call_is_mended_by_the_next(sandbox):
    sandbox.add_python("3.10")
    (sandbox.fake / "pip-is-slow").write_text("60")
    process = sandbox.start()
    sandbox.wait_for_call("install pins")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (sandbox.fake / "pip-is-slow").unlink()
    sandbox.calls()
    assert "interrupted" in sandbox.setup("--no-kaldifeat")
    assert sandbox.calls() == ["venv", "install pins", "install hashed"]
    assert sandbox.setup("--no-kaldifeat") == ""


def test_two_calls_at_once_install_once(sandbox):
    sandbox.add_python("3.10")
    (sandbox.fake / "pip-is-slow").write_text("1")
    first = sandbox.start("--no-kaldifeat")
    sandbox.wait_for_call("install pins")
    second = sandbox.start("--no-kaldifeat")
    assert first.wait(30) == 0
    assert "waiting" in second.communicate(timeout=30)[0]
    assert second.returncode == 0
    assert sandbox.calls() == ["venv", "install pins", "install hashed"]


def test_pip_failing_is_an_error_that_names_the_log_and_is_mended_by_the_next_call(sandbox):
    sandbox.add_python("3.10")
    (sandbox.fake / "pip-fails").touch()
    output = sandbox.setup(status=1)
    assert "no network" in output and ".setup-k2.log" in output and "ERROR" in output
    (sandbox.fake / "pip-fails").unlink()
    sandbox.calls()
    sandbox.setup("--no-kaldifeat")
    assert sandbox.calls() == ["install pins", "install hashed"]


def test_a_failed_build_is_a_warning_and_is_tried_again_only_when_asked(sandbox):
    sandbox.add_python("3.10")
    (sandbox.fake / "build-fails").touch()
    output = sandbox.setup()
    assert "WARNING" in output and "no such header" in output and "lhotse" in output
    sandbox.calls()
    assert sandbox.setup() == ""
    assert sandbox.calls() == []
    (sandbox.fake / "build-fails").unlink()
    sandbox.setup("--retry-builds")
    assert sandbox.calls()[-1] == "install wheel"


def test_kaldifeat_stays_left_out_until_it_is_asked_for(sandbox):
    sandbox.add_python("3.10")
    sandbox.setup("--no-kaldifeat")
    assert sandbox.calls() == ["venv", "install pins", "install hashed"]
    assert sandbox.setup() == ""
    assert sandbox.calls() == []
    sandbox.setup("--retry-builds")
    assert sandbox.calls()[-2:] == [f"wheel {pin('k2', 'kaldifeat')}", "install wheel"]


def test_a_shim_that_cannot_run_is_passed_over_for_pyenvs_version(sandbox, tmp_path):
    sandbox.add("python3.10", "echo 'python3.10: command not found' >&2; exit 127")
    real = sandbox.add_python("3.10", name="../pyenv/versions/3.10.13/bin/python")
    assert str(real.resolve()) in sandbox.setup("--no-kaldifeat").replace(str(real), str(real.resolve()))


def test_the_modern_environment_is_the_default_without_python_3_10(sandbox):
    sandbox.add_python("3.11")
    output = sandbox.setup("--no-kaldifeat")
    assert (sandbox.root / ".venv-default").read_text() == "modern\n"
    assert "no Python 3.10" in output and "no lattices" in output
    assert sandbox.calls() == ["venv", "install pins", f"wheel {pin('modern', 'fast_rnnt')}", "install wheel"]
    assert sandbox.setup("--no-kaldifeat") == ""


def test_uv_gets_the_python_that_is_missing(sandbox):
    python = sandbox.add_python("3.10", name="../uv/bin/python")
    sandbox.add(
        "uv",
        f"""case "$1 $2" in
  "--version ") ;;
  "python install") echo "uv install $3" >>"$FAKE/calls" ;;
  "python find") [ -e "$FAKE/calls" ] && echo {python} ;;
esac""",
    )
    output = sandbox.setup("--no-kaldifeat")
    assert str(python) in output and "uv python install 3.10" in output
    assert sandbox.calls() == ["uv install 3.10", "venv", "install pins", "install hashed"]
    assert (sandbox.root / ".venv-default").read_text() == "k2\n"


@pytest.mark.parametrize(
    "capability, env", [("9.0", "modern"), ("12.0", "modern"), ("8.6", "k2"), ("7.5", "k2")]
)
def test_the_gpu_decides_the_default(sandbox, capability, env):
    sandbox.add_python("3.10")
    sandbox.add_python("3.11")
    sandbox.add("nvidia-smi", f"echo 7.0; echo {capability}")
    output = sandbox.setup("--no-kaldifeat")
    assert (sandbox.root / ".venv-default").read_text() == f"{env}\n"
    assert ("sm_86" in output) == (env == "modern")


def test_env_can_be_asked_for_without_becoming_the_default(sandbox):
    sandbox.add_python("3.11")
    sandbox.setup("--env", "modern", "--no-kaldifeat")
    assert not (sandbox.root / ".venv-default").exists()


def test_too_little_disk_is_an_error_before_anything_is_made(sandbox):
    sandbox.add_python("3.10")
    sandbox.add_disk(free_gb=2)
    output = sandbox.setup("--env", "k2", status=1)
    assert "2048 MB are free" in output and str(sandbox.root) in output
    assert sandbox.calls() == [] and not (sandbox.root / ".venv").exists()


def test_no_python_is_an_error_that_says_what_to_install(sandbox):
    sandbox.add_python("3.11")
    output = sandbox.setup("--env", "k2", status=1)
    assert "no Python 3.10" in output and "--python" in output


@pytest.mark.parametrize("arguments", [["--kaldifeat"], ["--env", "k3"], ["--env"]])
def test_wrong_options_are_errors(sandbox, arguments):
    output = sandbox.setup(*arguments, status=2)
    assert output.count("\n") == 1 and "tools/setup.sh:" in output
    assert sandbox.calls() == []
