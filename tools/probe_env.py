"""Runs inside the environment that check_env.py looks at, and prints what it finds: one JSON object a line.

Arguments: what to look into, "facts" or modules to import for a try. An object with "about" is printed before
each and one with "found" after it, so that the last line names what ended the process, if something did.
Standard library only, any Python from 3.8.
"""

import importlib
import json
import os
import sys
import sysconfig
from importlib import metadata
from pathlib import Path


def facts() -> dict:
    """Interpreter, installed packages, and what shows whether source builds and espeak-ng will work."""
    found = {"version": list(sys.version_info[:3]), "packages": {}}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            # The first one on the path is the one that is imported.
            name = name.lower().replace("_", "-").replace(".", "-")
            found["packages"].setdefault(name, distribution.version)
    found["k2_files"] = [f.name for f in Path(sysconfig.get_path("purelib")).glob("_k2*")]
    found["headers"] = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    try:
        import espeakng_loader

        found["espeak_library"] = str(espeakng_loader.get_library_path())
        found["espeak_data"] = os.path.isdir(str(espeakng_loader.get_data_path()))
    except Exception:
        pass
    return found


def try_import(module: str) -> dict:
    """{"error": ""}, or what went wrong; with details for torch, k2 and soundfile."""
    try:
        imported = importlib.import_module(module)
        found = {"error": ""}
        if module == "torch":
            found["cuda"] = imported.version.cuda
            found["available"] = imported.cuda.is_available()
            # The list is empty without a usable driver; the build's own flags are always there.
            flags = imported._C._cuda_getArchFlags() if found["cuda"] else ""
            found["archs"] = (flags or "").split()
        elif module == "k2":
            version = importlib.import_module("_k2").version
            found["torch"], found["with_cuda"] = version.torch_version, bool(version.with_cuda)
        elif module == "soundfile":
            found["flac"] = "FLAC" in imported.available_formats()
        return found
    except BaseException as e:
        return {"error": " ".join(f"{type(e).__name__}: {e}".split())[:200]}


def main() -> None:
    for name in sys.argv[1:]:
        print(json.dumps({"about": name}), flush=True)
        found = facts() if name == "facts" else try_import(name)
        print(json.dumps({"found": name, **found}), flush=True)


if __name__ == "__main__":
    main()
