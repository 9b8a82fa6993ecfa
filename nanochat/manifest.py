"""`manifest.json` beside shards: what each should be, by whom they were made; compared before a shard is read.

    {"files": {"shard_00000.parquet": {"size": bytes, "sha256": hex, ...}, ...}, "val_shard": name, ..., "digest": hex}

Written by the downloader and by scripts/repackage.py. `digest` is of all the rest, so that a damaged manifest blames
itself and not a shard. A folder without one can be read too; nobody can then say whether its bytes have changed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.paths import as_written, read_json, sha256, write_json

NAME = "manifest.json"


def digest(content: dict[str, Any], name: str = "digest") -> str:
    """The checksum of a manifest without the entry `name`, its own."""
    rest = {key: value for key, value in content.items() if key != name}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write it, with its digest."""
    write_json(folder / NAME, content | {"digest": digest(content)})


def read(folder: Path) -> dict[str, Any]:
    """What the folder's manifest says, {} if there is none. UserError: it is damaged."""
    path = folder / NAME
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        sound = False
    elif "digest" in content:
        sound = content["digest"] == digest(content) and as_written(path, content)
    else:  # one written by hand, unless it is the checksum's name that was damaged
        texts = [name for name, value in content.items() if isinstance(value, str)]
        sound = not any(content[name] == digest(content, name) for name in texts)
    if not sound:
        raise UserError(
            f"{path} is damaged (it is not what was written): restore it, or fetch or make the shards again."
        )
    return content


def lock(folder: Path) -> Any:
    """The lock that a download into `folder` holds."""
    from filelock import FileLock

    return FileLock(folder / ".download.lock")


def download_under_way(folder: Path) -> bool:
    """Is some process fetching shards into `folder`?"""
    from filelock import Timeout

    try:
        with lock(folder).acquire(timeout=0):
            return False
    except Timeout:
        return True


class Checked:
    """The shards of a folder, each compared with the manifest once a process, when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = read(folder).get("files")
        self.files: dict[str, dict] = files if isinstance(files, dict) else {}
        self.good: set[str] = set()

    def path(self, name: str) -> Path:
        """Where a shard is. UserError: its size or SHA-256 is not the manifest's."""
        path, wanted = self.folder / name, self.files.get(name)
        if wanted and name not in self.good and path.exists():
            size = path.stat().st_size
            if size != wanted.get("size", size):
                raise UserError(f"{path} is damaged ({size:,} bytes instead of {wanted['size']:,})")
            if wanted.get("sha256") not in (None, sha256(path)):
                raise UserError(f"{path} is damaged (its checksum is not the manifest's)")
        self.good.add(name)
        return path
