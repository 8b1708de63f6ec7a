"""tools/check_env.py: what it makes of environments that are right, incomplete or mismatched."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tools"

spec = importlib.util.spec_from_file_location("check_env", TOOLS / "check_env.py")
check_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_env)
OK, WARNING, ERROR = check_env.OK, check_env.WARNING, check_env.ERROR


def environment(name="k2", version=(3, 10, 13), **packages):
    """An environment as the checks see it: all that is pinned, but for `packages` (None: not installed)."""
    pins = check_env.read_pins(TOOLS / f"requirements-{name}.txt")
    installed = {**pins, **{key.replace("_", "-"): value for key, value in packages.items()}}
    installed = {key: value for key, value in installed.items() if value is not None}
    imports = {m: {"error": ""} for m, package in check_env.IMPORTS.items() if package in installed}
    imports.setdefault("torch", {}).update({"cuda": None, "archs": [], "available": False})
    if "k2" in imports:
        imports["k2"].update({"torch": "1.13.1", "with_cuda": True})
    return SimpleNamespace(
        name=name,
        python=Path("/env/bin/python"),
        is_project=False,
        pins=pins,
        packages=installed,
        imports=imports,
        facts={"version": list(version), "headers": True, "k2_files": ["_k2.cpython-310.so"]},
        pip=lambda what: f"/env/bin/python -m pip install {what}",
        mend=lambda what: f"/env/bin/python -m pip install {what}",
    )


def levels(findings):
    return [f.level for f in findings]


@pytest.mark.parametrize("script", ["check_env.py", "probe_env.py"])
def test_only_the_standard_library_is_imported(script):
    tree = ast.parse((TOOLS / script).read_text())
    names = set()
    for node in ast.walk(tree):
        # What an installed package says of itself is imported inside a try, and may be missing.
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - {"espeakng_loader"} <= set(sys.stdlib_module_names)


def test_the_environment_that_runs_this_test_passes():
    if Path(sys.prefix).parent != ROOT:
        pytest.skip("these tests run in an environment that tools/setup.sh did not make")
    # Not sys.executable: it is the interpreter behind the environment's link in some Pythons.
    python = Path(sys.prefix) / "bin" / "python"
    done = subprocess.run(
        [sys.executable, TOOLS / "check_env.py", "--python", python], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout and "the libraries import" in done.stdout


def test_a_missing_interpreter_is_an_error_with_a_mend():
    done = subprocess.run(
        [sys.executable, TOOLS / "check_env.py", "--python", "/no/such/python"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "there is no /no/such/python" in done.stdout and "mend:" in done.stdout and not done.stderr


def test_pins_include_what_is_built_from_source():
    pins = check_env.read_pins(TOOLS / "requirements-k2.txt")
    assert pins["torch"] == "1.13.1" and pins["k2"] == "1.23.4" and "kaldifeat" in pins


@pytest.mark.parametrize("env", ["k2", "modern"])
def test_every_requirement_is_pinned_exactly(env):
    lines = (TOOLS / f"requirements-{env}.txt").read_text().splitlines()
    names = [line for line in lines if line.strip() and not line.startswith("# ")]
    assert len(names) == len(check_env.read_pins(TOOLS / f"requirements-{env}.txt"))


def test_missing_packages_are_one_error_with_the_line_that_installs_them():
    (finding,) = check_env.check_pins(environment(soundfile=None, sentencepiece=None))
    pins = environment().pins
    assert finding.level == ERROR
    assert f"soundfile=={pins['soundfile']} sentencepiece=={pins['sentencepiece']}" in finding.mend


def test_missing_packages_that_only_the_export_needs_are_a_warning():
    (finding,) = check_env.check_pins(environment(onnx=None))
    assert finding.level == WARNING and "stage 7" in finding.text


def test_another_version_than_the_tested_one_is_a_warning():
    (finding,) = check_env.check_pins(environment(scipy="1.0.0"))
    assert finding.level == WARNING and "1.0.0" in finding.text
    assert check_env.check_pins(environment(torch="1.13.1+cu117"))[0].level == OK


@pytest.mark.parametrize(
    "packages, word",
    [
        ({"lhotse": "1.33.0"}, "lhotse==1.32.1"),
        ({"torch": "2.13.0", "lhotse": "1.32.1"}, "lhotse==1.33.0"),
        ({"numpy": "2.1.0"}, "numpy<2"),
    ],
)
def test_versions_that_do_not_go_together_are_errors(packages, word):
    (finding,) = check_env.check_versions(environment(**packages))
    assert finding.level == ERROR and word in finding.mend


def test_versions_that_go_together_are_no_finding():
    assert check_env.check_versions(environment()) == []
    assert check_env.check_versions(environment("modern")) == []


def test_k2_that_pip_takes_for_another_python_is_an_error():
    env = environment("modern", version=(3, 11, 7), k2="1.23.4")
    env.imports["k2"] = {"error": "ModuleNotFoundError: No module named '_k2'"}
    (finding,) = check_env.check_k2(env)
    assert finding.level == ERROR and "cpython-310" in finding.text
    assert "uninstall -y k2" in finding.mend and "cpu.torch2.13.0-cp311-cp311" in finding.mend


def test_k2_made_for_another_torch_is_an_error():
    env = environment()
    env.imports["k2"]["torch"] = "1.12.1"
    (finding,) = check_env.check_k2(env)
    assert finding.level == ERROR and "1.12.1" in finding.text


def test_an_ancient_k2_is_an_error():
    (finding,) = check_env.check_k2(environment(k2="0.3.5"))
    assert finding.level == ERROR and "ancient" in finding.text


def test_no_k2_is_an_error_in_its_own_environment_and_a_warning_in_the_modern_one():
    assert levels(check_env.check_k2(environment(k2=None))) == [ERROR]
    assert levels(check_env.check_k2(environment("modern", version=(3, 11, 7)))) == [WARNING]


def test_a_library_that_ends_the_process_is_named(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    probe = 'import json, os, sys\nfor m in sys.argv[1:]:\n    print(json.dumps({"about": m}), flush=True)\n'
    probe += '    if m == "k2": os.abort()\n    print(json.dumps({"found": m, "error": ""}), flush=True)\n'
    (tmp_path / "tools" / "probe_env.py").write_text(probe)
    monkeypatch.setattr(check_env, "ROOT", tmp_path)
    env = SimpleNamespace(python=sys.executable)
    outcome = check_env.Environment._probe(env, ["torch", "k2", "lhotse"])
    assert outcome["torch"]["error"] == outcome["lhotse"]["error"] == ""
    assert "ended the process" in outcome["k2"]["error"]


@pytest.mark.parametrize("name", ["kaldifeat", "fast_rnnt"])
def test_a_missing_source_build_is_a_warning_that_says_what_serves_instead(name):
    findings = check_env.check_builds(environment("modern", **{name: None}))
    assert sorted(levels(findings)) == sorted([OK, WARNING])
    assert any(f.level == WARNING and name in f.text and "--retry-builds" in f.mend for f in findings)


ARCHS_1_13 = ["sm_37", "sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86"]


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (ARCHS_1_13, 80, True),
        (ARCHS_1_13, 89, True),  # binaries run on later minor versions
        (ARCHS_1_13, 90, False),
        (ARCHS_1_13, 120, False),
        (["sm_90", "compute_90"], 120, True),  # PTX is compiled by the driver
        (["sm_90a"], 90, True),
        ([], 80, False),
    ],
)
def test_which_gpus_a_build_of_torch_runs_on(archs, capability, runs):
    assert check_env.runs_on(archs, capability) is runs


@pytest.mark.parametrize(
    "facts, level, word",
    [
        ({"cuda": None}, WARNING, "without CUDA"),
        ({"cuda": "11.7", "archs": ARCHS_1_13}, ERROR, "sm_90"),
        ({"cuda": "12.8", "archs": ["sm_90"]}, WARNING, "driver"),
        ({"cuda": "12.8", "archs": ["sm_90"], "available": True}, OK, "CUDA 12.8"),
    ],
)
def test_a_gpu_and_the_torch_that_is_there(facts, level, word):
    env = environment()
    env.imports["torch"].update(facts)
    (finding,) = check_env.check_gpu(env, [("Some GPU", 90)])
    assert finding.level == level and word in finding.text + finding.mend
    assert "PIP_" not in finding.mend


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA A100, SXM, 8.0'\necho 'NVIDIA B200, 10.0'\necho 'Old, [N/A]'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_env.gpu_capabilities() == [("NVIDIA A100, SXM", 80), ("NVIDIA B200", 100)]


@pytest.mark.parametrize("free_gb, level", [(0.5, ERROR), (3, WARNING), (50, OK)])
def test_the_disk(monkeypatch, free_gb, level):
    monkeypatch.setattr(check_env.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 1e9))
    assert levels(check_env.check_disk()) == [level]
