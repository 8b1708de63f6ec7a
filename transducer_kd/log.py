"""Logging, errors meant for the user, progress and atomic writes: what every layer needs and nothing else.

The log line is icefall's: `time level [file:line] (rank/world) message`.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, TypeVar

Item = TypeVar("Item")


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PATH_MENDS = {
    FileNotFoundError: "name a path that exists",
    FileExistsError: "move it away or name another folder",
    IsADirectoryError: "name a file",
    NotADirectoryError: "name a folder; a part of this path is a file",
    PermissionError: "give yourself access or name another path",
}


class UserError(Exception):
    """Something the user can mend. The message names the thing (file, cut, key) and says what to do."""


def one_line(error: BaseException) -> str:
    """Kind and message of an error of a library, short enough for a line of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def setup_logging(log_file: Optional[Path] = None, rank: int = 0, world_size: int = 1) -> None:
    """Log to stderr, and to `log_file` too where given. Calling it again replaces the earlier handlers."""
    where = f" ({rank}/{world_size})" if world_size > 1 else ""
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s [%(filename)s:%(lineno)d]{where} %(message)s")
    handlers: list = [logging.StreamHandler()]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def run_main(main: Callable[[], Optional[int]]) -> None:
    """Run a program's main: a UserError, a full disk or a path that cannot be used becomes one clear line and
    exit status 1.
    """
    # A log file on a full disk would otherwise answer every message with a page of traceback.
    logging.raiseExceptions = False
    try:
        status = main()
    except UserError as e:
        logging.error("%s", e)
        status = 1
    except OSError as e:
        if e.errno in _DISK_FULL:
            logging.error("%s", disk_full(e.filename or os.getcwd()))
        elif e.filename is not None:
            mend = _PATH_MENDS.get(type(e), "mend that or name another path")
            logging.error("%s: %s; %s", e.filename, e.strerror, mend)
        else:
            raise
        status = 1
    except KeyboardInterrupt:
        logging.error("interrupted; run the same command again to go on")
        status = 130
    sys.exit(status or 0)


def disk_full(path: Any) -> UserError:
    """The error for a write that ran out of space; names the path and what is free there."""
    free_mb = _free_bytes(path) / 1e6
    return UserError(
        f"no space left on the disk while writing {path} ({free_mb:.0f} MB free, or what a quota leaves); "
        "free some and run again"
    )


def check_disk_space(folder: Path, needed_bytes: float, what: str) -> None:
    """Raise UserError unless `folder`'s disk has `needed_bytes` free for `what`."""
    free = _free_bytes(folder)
    if free < needed_bytes:
        raise UserError(
            f"{what} needs about {needed_bytes / 1e9:.2f} GB in {folder}, but only {free / 1e9:.2f} GB are "
            "free; free some or choose another folder"
        )


def _free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[Any]:
    """Open a temporary file beside `path` and move it into place only when the block succeeds.

    A reader sees the old file or the new one, never half of one, also after `kill -9` or a full disk.
    Raises UserError when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.chmod(temporary, 0o644)
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        if e.errno in _DISK_FULL:
            raise disk_full(path) from e
        raise
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def read_json(path: Path, mend: str = "move it away and make it again") -> Any:
    """What a JSON file holds. UserError that says what to do (`mend`) where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); {mend}") from None


def read_jsonl(path: Path, needed: Tuple[str, ...]) -> List[Dict[str, Any]]:
    """Objects of a JSON-lines file, [] where there is none; a last line cut short by a kill is left out.

    Raises UserError naming file and line for anything else that is no object with the `needed` keys.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines, objects = text.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines) and not text.endswith("\n"):
                continue
            raise UserError(f"{path}:{number} is not valid JSON; move the file away") from None
        if not isinstance(value, dict) or any(key not in value for key in needed):
            raise UserError(f"{path}:{number}: expected an object with {', '.join(needed)}")
        objects.append(value)
    return objects


def progress(items: Iterable[Item], total: Optional[int] = None, desc: str = "") -> Iterator[Item]:
    """Iterate with a tqdm bar on a terminal, and with a log line about every 10 s elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=desc, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > 10:
            logging.info("%s: %d%s, %.0f s", desc, count, f" of {total}" if total else "", now - start)
            last = now
    logging.info("%s: %d done in %.1f s", desc, count, time.monotonic() - start)
