"""Who may import whom, read from the imports with ast. A layer may import those below it that its row names.

The synthetic trees at the end show that each rule fails when it is broken.
"""

import ast
import sys
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "transducer_kd"

# {first name below the package: what else of the package it may import}. config and log are for everybody,
# and a subpackage may import itself.
EVERYBODY = ("config", "log")
MAY_IMPORT = {
    "config": ("config_checks",),
    "config_checks": (),
    "log": (),
    "arguments": (),
    # L1, independent of each other
    "data": (),
    "models": (),
    "losses": (),
    # L2
    "compress": ("models",),
    "decode": ("models", "data"),
    # L3
    "objectives": ("models", "losses", "decode"),
    # L4
    "train": ("objectives.base",),
    "export": ("models", "decode"),
    "report": (),
    # L5: the one place that names concrete classes
    "build": ("data", "models", "losses", "compress", "decode", "objectives", "train", "export"),
}

# {library: files and folders that may import it}; `lazy` ones only inside functions.
FENCES = {
    "k2": ("transducer_kd/losses/pruned_rnnt.py", "transducer_kd/decode/lattice.py"),
    "_k2": ("transducer_kd/losses/pruned_rnnt.py", "transducer_kd/decode/lattice.py"),
    "fast_rnnt": ("transducer_kd/losses/pruned_rnnt.py", "transducer_kd/decode/lattice.py"),
    "kaldifeat": ("transducer_kd/data/",),
    "lhotse": ("transducer_kd/data/", "local/"),
    "onnx": ("transducer_kd/export/",),
    "onnxruntime": ("transducer_kd/export/",),
    "sherpa_onnx": ("transducer_kd/export/",),
}
LAZY = ("k2", "_k2", "fast_rnnt", "kaldifeat")
SCRIPTS_MAY_IMPORT = {PACKAGE, "lhotse", "numpy", "torch", *sys.stdlib_module_names}


class Import(NamedTuple):
    """One imported module, absolute, and where."""

    module: str
    line: int
    is_lazy: bool  # inside a function, or for type checkers only


def imports_of(path: Path, module: str) -> Iterator[Import]:
    """All imports of a file, import_module("...") too; relative ones resolved against its name `module`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def walk(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            lazy = is_lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                # `from a import b` may import the module a.b: name it, the rules look at beginnings.
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, lazy)
            elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
                called = (
                    child.func.attr
                    if isinstance(child.func, ast.Attribute)
                    else getattr(child.func, "id", "")
                )
                if called in ("import_module", "__import__") and isinstance(child.args[0].value, str):
                    yield Import(child.args[0].value, child.lineno, lazy)
            yield from walk(child, lazy)

    yield from walk(tree, False)


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_problem(importer: str, imported: str) -> Optional[str]:
    """Why `importer` may not import `imported`, modules of the package named without it; None if it may."""
    if not importer:
        return f"{PACKAGE}/__init__.py imports nothing of the package"
    home = importer.split(".")[0]
    if home not in MAY_IMPORT:
        return f"{home} has no place among the layers; give it one in tests/test_layers.py"
    if any(is_under(imported, name) for name in (home, *EVERYBODY, *MAY_IMPORT[home])):
        return None
    return f"{home} may import {', '.join((*EVERYBODY, *MAY_IMPORT[home]))}"


def find_violations(root: Path) -> List[str]:
    """One line `file:line: import: rule` for every import that breaks a rule."""
    found = []
    scripts = {path.stem for path in (root / "local").glob("*.py")}
    for path in sorted([*(root / PACKAGE).rglob("*.py"), *(root / "local").glob("*.py")]):
        relative = path.relative_to(root)
        is_script = relative.parts[0] == "local"
        module = ".".join(relative.with_suffix("").parts)
        module = module[: -len(".__init__")] if module.endswith(".__init__") else module
        for item in imports_of(path, module):
            problem, top = None, item.module.split(".")[0]
            if top == PACKAGE and not is_script:
                problem = layer_problem(module[len(PACKAGE) + 1 :], item.module[len(PACKAGE) + 1 :])
            elif top in FENCES and not str(relative).startswith(FENCES[top]):
                problem = f"{top} is only imported in {', '.join(FENCES[top])}"
            elif top in LAZY and not item.is_lazy:
                problem = f"{top} is imported inside functions only, so that everything else works without it"
            elif top == "local" or (is_script and top in scripts):
                problem = "nobody imports the scripts"
            elif is_script and top not in SCRIPTS_MAY_IMPORT:
                problem = f"scripts import {PACKAGE}, lhotse, numpy, torch and the standard library"
            if problem:
                found.append(f"{relative}:{item.line}: {item.module}: {problem}")
    return found


def test_the_imports_of_this_project_keep_to_the_layers():
    assert find_violations(ROOT) == []


def test_every_folder_of_the_package_has_a_layer():
    names = {p.stem for p in (ROOT / PACKAGE).iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert names <= set(MAY_IMPORT)


def write_tree(root: Path, files: dict) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


BROKEN = {
    "models import losses": ("transducer_kd/models/bad.py", "from transducer_kd.losses import pruned_rnnt\n"),
    "relative import": ("transducer_kd/models/bad.py", "from ..losses.pruned_rnnt import simple_loss\n"),
    "inside a function": (
        "transducer_kd/data/bad.py",
        "def f():\n    import transducer_kd.models.conformer\n",
    ),
    "data import decode": ("transducer_kd/data/bad.py", "import transducer_kd.decode.greedy as g\n"),
    "train imports a concrete objective": (
        "transducer_kd/train/bad.py",
        "from transducer_kd.objectives.transducer import T\n",
    ),
    "train imports objectives as a whole": (
        "transducer_kd/train/bad.py",
        "from transducer_kd import objectives\n",
    ),
    "report imports decode": ("transducer_kd/report/bad.py", "from transducer_kd.decode import wer\n"),
    "log imports config's users": ("transducer_kd/log.py", "from transducer_kd import build\n"),
    "an unknown folder": ("transducer_kd/helpers/bad.py", "from transducer_kd import models\n"),
    "k2 in the models": ("transducer_kd/models/bad.py", "def f():\n    import k2\n"),
    "k2 when the module loads": ("transducer_kd/decode/lattice.py", "import k2\n"),
    "k2 by name": ("transducer_kd/models/bad.py", "import importlib\nk2 = importlib.import_module('k2')\n"),
    "lhotse outside data": ("transducer_kd/decode/bad.py", "from lhotse import CutSet\n"),
    "onnxruntime outside export": ("transducer_kd/report/bad.py", "import onnxruntime as ort\n"),
    "a script imports a script": ("local/bad.py", "import train\n"),
    "the package imports a script": ("transducer_kd/build.py", "from local.train import main\n"),
    "a script imports a library": ("local/bad.py", "import sentencepiece\n"),
    "a script imports k2": ("local/bad.py", "def f():\n    import k2\n"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found(tmp_path, name):
    path, text = BROKEN[name]
    write_tree(tmp_path, {"local/train.py": "import torch\n", path: text})
    violations = find_violations(tmp_path)
    assert len(violations) == 1 and violations[0].startswith(f"{path}:"), violations


def test_what_is_allowed_is_not_found(tmp_path):
    files = {
        "transducer_kd/build.py": "from transducer_kd import log\nfrom transducer_kd.train import a\n",
        "transducer_kd/decode/lattice.py": "from transducer_kd.models import x\ndef f():\n    import k2\n",
        "transducer_kd/train/a.py": "from transducer_kd.objectives.base import Base\nfrom . import optim\n",
        "transducer_kd/models/__init__.py": "from .conformer import Conformer\nimport torch\n",
        "local/train.py": "import lhotse, torch\nfrom transducer_kd import build\n",
        "local/decode.py": "import json\nfrom transducer_kd.decode import greedy\n",
    }
    assert find_violations(write_tree(tmp_path, files)) == []
