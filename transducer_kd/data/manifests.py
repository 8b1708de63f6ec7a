"""Reading lhotse manifest files; whatever is wrong with one is an error that names it."""

from pathlib import Path
from typing import Any, List

from transducer_kd.log import UserError, one_line


def read_prepared(kind: str, manifests_dir: Path, part: str) -> List[Any]:
    """recordings or supervisions (`kind`) of a part, as local/prepare_manifests.py wrote them."""
    path = Path(manifests_dir) / f"{kind}_{part}.jsonl.gz"
    if not path.is_file():
        raise UserError(f"{path} does not exist; make it with local/prepare_manifests.py")
    return read_manifest(kind, path, "make it again with local/prepare_manifests.py")


def read_manifest(kind: str, path: Path, mend: str = "delete it and make it again") -> List[Any]:
    """All items of a lhotse file. kind: "recordings", "supervisions" or "cuts"; mend: what the error advises.

    Raises UserError for a file that is missing, cut short, or not such a manifest.
    """
    from lhotse import CutSet, RecordingSet, SupervisionSet  # late: --help should not wait for it

    reader = {"recordings": RecordingSet, "supervisions": SupervisionSet, "cuts": CutSet}[kind]
    try:
        return list(reader.from_file(path))
    except Exception as e:  # gzip, JSON and lhotse each have their own
        raise UserError(f"{path} cannot be read as lhotse {kind} ({one_line(e)}); {mend}") from None
