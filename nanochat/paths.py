"""Where artefacts live, and writing them so that a file is either whole or absent."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nanochat.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a limit


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
    """Yield a file under a temporary name beside `path`; on success fsync and rename, on any failure remove it.

    UserError: the disk is full, or the folder can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error
    try:
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS):
            raise UserError(_unwritable(path, error)) from error
        raise


@contextlib.contextmanager
def staged(path: Path | str) -> Iterator[Path]:
    """Yield a place of `path`'s name in a temporary folder beside it, for a file, files or a folder that others write.

    On success all that lies there is made durable and moved beside `path` (what had its name is replaced); on any
    failure, Ctrl-C too, it is removed. UserError: the disk is full, or the folder can't be written.
    """
    path = Path(path).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error
    try:
        stage.chmod(0o755)
        yield stage / path.name
        for file in (found for found in stage.rglob("*") if found.is_file()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        for made in stage.iterdir():
            if made.is_dir():
                shutil.rmtree(path.parent / made.name, ignore_errors=True)
            os.replace(made, path.parent / made.name)
        sync_folder(path.parent)
    except (OSError, RuntimeError, UserError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        silent = cause is error and getattr(error, "errno", None) is None
        if silent and shutil.disk_usage(stage).free < 2**16:
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # numpy and torch don't say why a write failed
        if isinstance(cause, OSError) and cause.errno in (*FULL, errno.EROFS):
            raise UserError(_unwritable(path, cause)) from error  # by its own name, not the temporary one
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> str:
    remedy = "free some space" if error.errno in FULL else "choose a place that can be written"
    return f"{path} can't be written ({error.strerror}): {remedy} and run this again."


def write_json(path: Path | str, value: Any) -> None:
    """Write strict JSON (no NaN, no Infinity) atomically."""
    text = _json(value)
    with atomic_write(path, "w") as file:
        file.write(text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or damaged one is a UserError naming it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): it is damaged; restore or remove it.") from error


def as_written(path: Path | str, value: Any) -> bool:
    """Is the file what `write_json` makes of its value? Damage can leave the value alone: a blank, a letter's case."""
    return Path(path).read_text(encoding="utf-8") == _json(value)


def sha256(path: Path | str) -> str:
    """The hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path | str) -> int:
    """Free bytes of the disk that holds `path`."""
    return shutil.disk_usage(path).free


def fetch(url: str, path: Path, checksum: str | None = None, timeout: float = 30.0) -> Path:
    """Download `url` to `path` unless it is there: one process at a time, whole or not at all; returns `path`.

    checksum: the SHA-256 it must have. UserError: it can't be fetched, arrived in part, or is another file.
    """
    from filelock import FileLock

    if path.exists():  # it was renamed into place, so it is whole
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            _download(url, path, checksum, timeout)
    return path


def _download(url: str, path: Path, checksum: str | None, timeout: float) -> None:
    import http.client
    import urllib.request

    from tqdm import tqdm

    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer, atomic_write(path) as file:
            size = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := answer.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                    bar.update(len(chunk))
            if size and file.tell() != size:
                raise UserError(f"{url} broke off after {file.tell():,} of {size:,} bytes: try again.")
            if checksum not in (None, digest.hexdigest()):
                raise UserError(
                    f"{url} is not the file it was (SHA-256 {digest.hexdigest()}): get a known copy elsewhere."
                )
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url} can't be fetched to {path} ({error}).") from error
