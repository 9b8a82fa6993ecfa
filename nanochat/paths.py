"""Where artefacts live, and writing them so that a file is either whole or absent."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nanochat.errors import UserError


def base_dir() -> Path:
    """The root of all artefacts: `NANOCHAT_BASE_DIR`, else `~/.cache/nanochat`; created on first use."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The artefact folder {path} can't be made ({error.strerror}): set NANOCHAT_BASE_DIR to a writable folder."
        ) from error
    return path


def sync_folder(path: Path) -> None:
    """Make a rename inside `path` durable (POSIX: fsync of the directory)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO]:
    """Yield a file under a temporary name beside `path`; on success fsync and rename, on any failure remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_json(path: Path | str, value: Any) -> None:
    """Write strict JSON (no NaN, no Infinity) atomically."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or damaged one is a UserError naming it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): it is damaged; restore or remove it.") from error


def sha256(path: Path | str) -> str:
    """The hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path | str) -> int:
    """Free bytes of the disk that holds `path`."""
    return shutil.disk_usage(path).free
