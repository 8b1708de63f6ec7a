#!/usr/bin/env python3
"""Say what is missing or does not fit in a Python environment of this project; print the line that mends it.

  python3 tools/check_env.py                 the project's environment (.venv, or what .venv-default says)
  python3 tools/check_env.py --env modern    the modern environment
  python3 tools/check_env.py --python PATH   any other interpreter

Runs in any Python from 3.8 and needs nothing else: the environment is looked at from outside, in processes of
its own, because a broken k2 may end the process that imports it. Exit status 0: training and decoding work
(warnings are about what is optional). 1: something needed is missing.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parent.parent

OK, WARNING, ERROR = "ok", "warning", "ERROR"

# Needed by no training or decoding.
FOR_EXPORT = ("onnx", "onnxruntime", "sherpa-onnx")  # stage 7
FOR_TESTS = ("pytest", "pytest-xdist", "ruff")
FOR_BUILDS = ("setuptools", "wheel", "cmake", "ninja", "pybind11")
FOR_SYNTHETIC = ("espeakng-loader",)  # --corpus synthetic
OPTIONAL = {
    "the export, stage 7": FOR_EXPORT,
    "the tests": FOR_TESTS,
    "builds from source": FOR_BUILDS,
    "--corpus synthetic": FOR_SYNTHETIC,
}

# What is imported for a try: {module: pip name}.
IMPORTS = {
    "torch": "torch",
    "k2": "k2",
    "fast_rnnt": "fast-rnnt",
    "kaldifeat": "kaldifeat",
    "lhotse": "lhotse",
    "numpy": "numpy",
    "soundfile": "soundfile",
    "sentencepiece": "sentencepiece",
    "kaldialign": "kaldialign",
    "torch.utils.tensorboard": "tensorboard",
    "onnxruntime": "onnxruntime",
    "sherpa_onnx": "sherpa-onnx",
}


class Finding(NamedTuple):
    """One line of the answer."""

    level: str
    text: str
    mend: str = ""


class Environment:
    """What probe_env.py finds out about the interpreter under examination."""

    def __init__(self, python: Path, name: str):
        self.python = python
        self.name = name  # k2 or modern
        self.is_project = python.parent.parent.parent == ROOT
        self.pins = read_pins(ROOT / "tools" / f"requirements-{name}.txt")
        self.facts = self._probe(["facts"]).get("facts", {})
        self.packages: Dict[str, str] = self.facts.get("packages", {})
        # {module: {"error": what went wrong or nothing, ...}} of every installed one
        self.imports = self._probe([m for m, package in IMPORTS.items() if package in self.packages])

    def _probe(self, names: List[str]) -> Dict[str, Dict[str, Any]]:
        """What probe_env.py says about `names`; a module that ends its process is said to do so."""
        environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        outcome: Dict[str, Dict[str, Any]] = {}
        while len(outcome) < len(names):
            rest = [name for name in names if name not in outcome]
            command = [str(self.python), str(ROOT / "tools" / "probe_env.py"), *rest]
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=600)
            except (OSError, subprocess.TimeoutExpired):
                return outcome
            # Libraries may print as well.
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
            if not lines:
                return outcome
            for line in lines:
                if "about" in line:
                    outcome[line["about"]] = {"error": f"it ended the process (status {done.returncode})"}
                else:
                    outcome[line["found"]] = line
        return outcome

    def pip(self, what: str) -> str:
        """The line that installs `what`."""
        return f"{self.python} -m pip install {what}"

    def mend(self, what: str) -> str:
        """setup.sh for the project's own environments, pip for others."""
        return f"tools/setup.sh --env {self.name}" if self.is_project else self.pip(what)


def read_pins(path: Path) -> Dict[str, str]:
    """{name: version} of a requirements file, also of what setup.sh handles by itself (#build:, #hashed:)."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"^(?:#(?:build|hashed): )?([A-Za-z0-9_.-]+)==(\S+)(?: --hash=\S+)*$", line.strip())
        if match:
            pins[match.group(1).lower().replace("_", "-")] = match.group(2)
    return pins


def number(version: str) -> Tuple[int, ...]:
    """'1.13.1+cu117' -> (1, 13, 1)."""
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def check_python(env: Environment) -> List[Finding]:
    version = tuple(env.facts["version"])
    text = f"Python {'.'.join(map(str, version))} ({env.python})"
    if version < (3, 10):
        return [Finding(ERROR, f"{text}: the project needs 3.10 or newer", "tools/setup.sh")]
    if env.name == "k2" and version[:2] != (3, 10):
        return [Finding(ERROR, f"{text}: k2's PyPI wheel needs 3.10", "tools/setup.sh --env k2")]
    return [Finding(OK, text)]


def check_pins(env: Environment) -> List[Finding]:
    """Every pinned package: there, and of the tested version? k2 and the builds have checks of their own."""
    pins = {n: v for n, v in env.pins.items() if n not in ("k2", "fast-rnnt", "kaldifeat")}
    missing = [name for name in pins if name not in env.packages]
    found = []
    for use, names in [*OPTIONAL.items(), ("", missing)]:
        lacking = [name for name in names if name in missing]
        if not lacking:
            continue
        missing = [name for name in missing if name not in lacking]
        line = env.mend(" ".join(f"{name}=={pins[name]}" for name in lacking))
        text = f"not installed: {', '.join(lacking)}" + (f"; only needed for {use}" if use else "")
        found.append(Finding(WARNING if use else ERROR, text, line))
    for name, wanted in pins.items():
        have = env.packages.get(name, wanted)
        if number(have) != number(wanted):
            text = f"{name} is {have}; tested with {wanted}"
            found.append(Finding(WARNING, text, env.mend(f"{name}=={wanted}")))
    return found or [Finding(OK, f"{len(pins)} pinned packages, none missing, none of another version")]


def check_versions(env: Environment) -> List[Finding]:
    """Pairs of versions that are known not to work together."""
    found = []
    torch, lhotse, numpy = (number(env.packages.get(name, "")) for name in ("torch", "lhotse", "numpy"))
    if torch and lhotse:
        if torch < (2,) and lhotse > (1, 32, 1):
            text = f"lhotse {env.packages['lhotse']}: its samplers fail on torch {env.packages['torch']}"
            found.append(Finding(ERROR, text, env.pip("lhotse==1.32.1")))
        elif torch >= (2, 13) and lhotse < (1, 33):
            text = f"lhotse {env.packages['lhotse']}: its samplers fail on torch {env.packages['torch']}"
            found.append(Finding(ERROR, text, env.pip("lhotse==1.33.0 urllib3 lilcom")))
    if torch and numpy:
        if torch < (2, 3) and numpy >= (2,):
            text = f"numpy {env.packages['numpy']}: torch {env.packages['torch']} was built for numpy 1"
            found.append(Finding(ERROR, text, env.pip("'numpy<2'")))
    return found


def check_imports(env: Environment) -> List[Finding]:
    """Does each installed library import? k2 and the builds have checks of their own."""
    found = []
    for module, outcome in env.imports.items():
        name, error = IMPORTS[module], outcome["error"]
        if error and name not in ("k2", "fast-rnnt", "kaldifeat"):
            level = WARNING if name in FOR_EXPORT else ERROR
            again = env.pip(f"--force-reinstall --no-deps {name}=={env.pins.get(name, env.packages[name])}")
            found.append(Finding(level, f"{module} is installed but does not import: {error}", again))
    if not env.imports.get("soundfile", {}).get("flac", True):
        again = env.pip("--force-reinstall --no-deps soundfile")
        found.append(Finding(ERROR, "soundfile's libsndfile cannot read FLAC", again))
    return found or [Finding(OK, "the libraries import, soundfile reads FLAC")]


def check_k2(env: Environment) -> List[Finding]:
    """k2 must be made for exactly this Python and torch."""
    torch = env.packages.get("torch", "")
    uninstall = f"{env.python} -m pip uninstall -y k2"
    if env.name == "k2":
        right = env.mend("torch==1.13.1 k2==1.23.4")
    else:
        cp = "cp{}{}".format(*env.facts["version"][:2])
        cuda = env.imports.get("torch", {}).get("cuda")
        build = f"{'cuda' + cuda if cuda else 'cpu'}.torch{torch.split('+')[0]}-{cp}-{cp}"
        right = (
            f"{env.python} -m pip install --no-deps FILE, where FILE is the wheel k2-*+{build}-*.whl from "
            "the pages of wheels that k2's documentation (Installation, From wheels) links"
        )
    if "k2" not in env.packages:
        if env.name == "k2":
            return [Finding(ERROR, "k2 is not installed", right)]
        text = "k2 is not installed: no lattices (fast_beam_search). A plain `pip install k2` does not help"
        return [Finding(WARNING, text, right)]
    text = f"k2 {env.packages['k2']}"
    if number(env.packages["k2"]) < (1, 23):
        text += ": an ancient build, as pip takes for a Python without a newer one"
        return [Finding(ERROR, text, f"{uninstall}; {right}")]
    facts = env.imports["k2"]
    error = facts["error"]
    if error:
        built_for = ", ".join(env.facts.get("k2_files", []))
        text += f" does not import ({error}); it was made for another Python or torch"
        text += f": it holds {built_for}" if built_for else ""
        return [Finding(ERROR, text, f"{uninstall}; {right}")]
    if number(facts["torch"]) != number(torch):
        text += f" was made for torch {facts['torch']}, here is {torch}: expect crashes"
        return [Finding(ERROR, text, right)]
    if env.imports["torch"]["cuda"] and not facts["with_cuda"]:
        return [Finding(WARNING, f"{text} has no CUDA: lattices on the CPU only", right)]
    return [Finding(OK, f"{text}, made for torch {facts['torch']}")]


def check_builds(env: Environment) -> List[Finding]:
    """fast_rnnt and kaldifeat, which are built from source and optional."""
    found = []
    retry = f"tools/setup.sh --env {env.name} --retry-builds"
    fallback = {
        "fast_rnnt": "the pruned loss comes from the project's own torch code",
        "kaldifeat": "features come from lhotse, equal within 1e-3",
    }
    for module, instead in fallback.items():
        name = module.replace("_", "-")
        if name not in env.pins and name not in env.packages:
            continue
        error = env.imports.get(module, {}).get("error")
        if error == "":
            found.append(Finding(OK, f"{module} {env.packages[name]}"))
            continue
        why = f"does not import ({error})" if error else "is not installed"
        missing = [tool for tool in ("c++", "make") if not shutil.which(tool)]
        if missing:
            retry = f"install {' and '.join(missing)} (Debian: build-essential), then {retry}"
        elif not env.facts.get("headers"):
            retry = f"install Python's headers (Debian: python3-dev), then {retry}"
        found.append(Finding(WARNING, f"{module} {why}: {instead}", retry))
    return found


def gpu_capabilities() -> List[Tuple[str, int]]:
    """(name, compute capability times ten) of every GPU, from nvidia-smi."""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return []
    query = [smi, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = re.findall(r"^(.+?),\s*(\d+)\.(\d)\s*$", out, re.MULTILINE)
    return [(name, 10 * int(major) + int(minor)) for name, major, minor in rows]


def runs_on(archs: List[str], capability: int) -> bool:
    """Whether kernels for `archs` run on a GPU: binaries within a major version, PTX on all that is newer."""
    for arch in archs:
        kind, _, digits = arch.partition("_")
        built = int(re.sub(r"\D", "", digits) or 0)
        if kind == "sm" and built // 10 == capability // 10 and built <= capability:
            return True
        if kind == "compute" and built <= capability:
            return True
    return False


def check_gpu(env: Environment, gpus: List[Tuple[str, int]]) -> List[Finding]:
    """Can this torch use the GPUs?"""
    facts = env.imports.get("torch", {})
    if facts.get("error", "not there"):
        return []  # said already
    if not gpus:
        return [Finding(OK, "no GPU: everything runs on the CPU")]
    torch, cuda, archs = env.packages["torch"], facts["cuda"], facts["archs"]
    found = []
    for name, capability in gpus:
        gpu = f"{name} (sm_{capability})"
        if not cuda:
            again = env.pip("--force-reinstall torch==" + torch.split("+")[0])
            text = f"{gpu} is idle: torch {torch} was built without CUDA"
            found.append(Finding(WARNING, text, again))
        elif not runs_on(archs, capability):
            line = "tools/setup.sh --env modern" if env.name == "k2" else env.pip("--upgrade torch")
            found.append(Finding(ERROR, f"{gpu}: torch {torch} has kernels for {' '.join(archs)} only", line))
        elif not facts["available"]:
            line = f"install an NVIDIA driver that serves CUDA {cuda}; nvidia-smi shows the one there"
            found.append(Finding(WARNING, f"{gpu} cannot be used by torch {torch} (CUDA {cuda})", line))
        else:
            found.append(Finding(OK, f"{gpu}, torch {torch}, CUDA {cuda}"))
    return found


def check_espeak(env: Environment) -> List[Finding]:
    library = env.facts.get("espeak_library")
    if "espeakng-loader" not in env.packages:
        return []  # said already
    try:
        if not library or not env.facts.get("espeak_data"):
            raise OSError("its library or its voices are missing")
        ctypes.CDLL(library).espeak_Initialize  # noqa: B018  whether the symbol is there
    except (OSError, AttributeError) as e:
        line = env.pip(f"--force-reinstall espeakng-loader=={env.pins['espeakng-loader']}")
        return [Finding(WARNING, f"espeak-ng cannot be loaded ({e}); only --corpus synthetic needs it", line)]
    return [Finding(OK, "espeak-ng loads")]


def check_disk() -> List[Finding]:
    free_gb = shutil.disk_usage(str(ROOT)).free / 1e9
    text = f"{free_gb:.1f} GB free in {ROOT}"
    line = "free some, or clone the project to a larger disk"
    if free_gb < 1:
        return [Finding(ERROR, f"{text}: too little for anything", line)]
    if free_gb < 5:
        return [Finding(WARNING, f"{text}: a recipe takes about 2, the environments 5 more", line)]
    return [Finding(OK, text)]


def choose(args: argparse.Namespace) -> Tuple[Path, str]:
    """The interpreter to look at, and whether it should be the k2 or the modern environment."""
    default = ROOT / ".venv-default"
    name = args.env or (default.read_text(encoding="utf-8").strip() if default.is_file() else "k2")
    if args.python:
        python = Path(shutil.which(args.python) or args.python)
        # Not resolved: a virtual environment is known by the path of its link.
        python = Path(os.path.abspath(str(python)))
        if not args.env:
            code = "import importlib.metadata as m; print(m.version('torch'))"
            try:
                out = subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()
            except OSError:
                out = ""
            name = "k2" if number(out) and number(out) < (2,) else "modern"
        return python, name
    return ROOT / (".venv" if name == "k2" else f".venv-{name}") / "bin" / "python", name


def show(findings: List[Finding]) -> None:
    for finding in findings:
        print(f"{finding.level:8}{finding.text}")
        if finding.mend and finding.level != OK:
            print(f"{'':8}  mend: {finding.mend}")


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--python", help="interpreter to look at (default: the project's environment)")
    parser.add_argument("--env", choices=("k2", "modern"), help="what it should be (default: as set up)")
    args = parser.parse_args()
    python, name = choose(args)
    if not os.access(str(python), os.X_OK):
        line = "give --python the path of an interpreter" if args.python else f"tools/setup.sh --env {name}"
        show([Finding(ERROR, f"there is no {python}", line), *check_disk()])
        return 1
    env = Environment(python, name)
    if not env.facts:
        show(
            [
                Finding(
                    ERROR, f"{python} does not run, or is older than 3.8", f"tools/setup.sh --env {name}"
                ),
                *check_disk(),
            ]
        )
        return 1
    print(f"looking at {python} as the {name} environment")
    findings = [
        *check_python(env),
        *check_pins(env),
        *check_versions(env),
        *check_imports(env),
        *check_k2(env),
        *check_builds(env),
        *check_gpu(env, gpu_capabilities()),
        *check_espeak(env),
        *check_disk(),
    ]
    show(findings)
    errors = sum(f.level == ERROR for f in findings)
    warnings = sum(f.level == WARNING for f in findings)
    print(f"{errors} errors, {warnings} warnings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
