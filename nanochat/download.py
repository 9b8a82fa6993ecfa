"""Fetch the shards of a pretraining corpus from the Hugging Face hub: python -m nanochat.dataset -n 8

The validation shard always comes first; then training shards in order. A shard counts only when its size and SHA-256
are those the hub states. Interrupted transfers go on where they stopped, in the same run or the next. The first run
takes climbmix at a known commit and fineweb-edu, of which none is known, at its newest; the commit is written to
`manifest.json` beside the shards with each file's size and checksum, and all later runs stay at it. HF_ENDPOINT,
HF_TOKEN and the other variables of huggingface_hub are honoured. Exit status 1 names the shards that failed; running
the same command again goes on with just those.
"""

import contextlib
import errno
import io
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanochat.dataset import HUB, HubCorpus
from nanochat.errors import UserError
from nanochat.manifest import NAME, lock
from nanochat.manifest import read as read_manifest
from nanochat.manifest import write as write_manifest
from nanochat.paths import base_dir, free_bytes, sha256

ATTEMPTS = 5  # per shard, as published; each one also retries inside a transfer that makes progress
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled each time
FINAL = (401, 403, 404)  # HTTP answers that another attempt won't change
GIVE_UP = 8  # shards that fail in a row before the rest is not even tried


@dataclass(frozen=True)
class Config:
    """What to fetch."""

    # training shards to have, counted from the first; -1: all of them (climbmix about 0.6 TB, fineweb-edu 0.2 TB)
    num_files: Annotated[int, tyro.conf.arg(aliases=["-n"])] = -1
    # shards fetched at the same time
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4
    # climbmix or fineweb-edu
    dataset: str = "climbmix"
    # branch, tag or commit on the hub; empty: the commit of an earlier download, else the known one, else the newest
    revision: str = ""


def main(cfg: Config) -> dict:
    """Fetch; returns {"folder", "files", "revision"}. UserError if a shard failed."""
    if cfg.dataset not in HUB:
        raise UserError(
            f"There is nothing to download for --dataset={cfg.dataset}: the hub has {' and '.join(HUB)}; "
            "tinyworld and folders are read in place."
        )
    source = HUB[cfg.dataset]
    count = source.train_shards if cfg.num_files == -1 else cfg.num_files
    if not 0 <= count <= source.train_shards or cfg.num_workers < 1:
        raise UserError(
            f"{cfg.dataset} has {source.train_shards} training shards: give -n from 0 to that, or -1 for all of them, "
            "and -w 1 or more."
        )
    names = [source.val_shard, *(source.shard(i) for i in range(count))]
    report = fetch(source, base_dir() / source.folder, names, revision=cfg.revision, workers=cfg.num_workers)
    print(f"{len(names)} shards of {cfg.dataset} are complete in {report['folder']} (commit {report['revision']})")
    return report


def fetch(
    source: HubCorpus,
    folder: Path,
    names: list[str],
    *,
    revision: str = "",
    workers: int = 4,
    endpoint: str | None = None,
    progress: bool | None = None,
) -> dict:
    """Bring `names` of the hub's data set into `folder`, whole and checked; returns {"folder", "files", "revision"}.

    `endpoint` replaces the hub's address (default: HF_ENDPOINT); `progress` None shows a bar on a terminal only.
    UserError: the hub can't be reached, another revision is already there, the disk is full, or shards failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _fetch(source, folder, names, revision, workers, endpoint, progress)


def _fetch(
    source: HubCorpus,
    folder: Path,
    names: list[str],
    revision: str,
    workers: int,
    endpoint: str | None,
    progress: bool | None,
) -> dict:
    hub = _Hub(source.repo, endpoint)
    manifest = _manifest(source, folder)
    first = hub.first_look(names[0], revision or manifest["revision"] or source.revision)
    if manifest["revision"] not in (None, first.commit):
        raise UserError(
            f"{folder} holds shards of commit {manifest['revision'][:12]} and --revision={revision} is another "
            f"({first.commit[:12]}): leave --revision out, or set NANOCHAT_BASE_DIR to a new folder."
        )
    manifest["revision"] = hub.commit = first.commit
    missing = [name for name in names if not _have(folder / name, manifest["files"].get(name))]
    _check_room(folder, len(missing) * first.size, source)
    with _quiet_hub():
        failed = _fetch_all(hub, folder, missing, manifest, workers, progress)
    if failed:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(names)} shards failed; run the same command again, it goes on with these:\n{listed}"
        )
    return {"folder": str(folder), "files": names, "revision": hub.commit}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one download at a time into a folder; a second one waits: the first may be what a killed recipe left."""
    from filelock import Timeout

    held = lock(folder)
    try:
        held.acquire(timeout=1)  # a reader that looks whether someone downloads holds it for a moment
    except Timeout:
        print(f"another download into {folder} is under way: waiting until it is done", flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _manifest(source: HubCorpus, folder: Path) -> dict:
    if (folder / NAME).exists():
        manifest = read_manifest(folder)
        if manifest.get("repo") != source.repo:
            raise UserError(f"{folder / NAME} is not of {source.repo}: move that folder away and run again.")
        return manifest
    return {"repo": source.repo, "revision": None, "val_shard": source.val_shard, "files": {}}


def _have(path: Path, entry: dict | None) -> bool:
    """Whether a shard checked by an earlier run still lies there."""
    return entry is not None and path.exists() and path.stat().st_size == entry["size"]


def _check_room(folder: Path, need: int, source: HubCorpus) -> None:
    free = free_bytes(folder)
    if need > free:
        raise UserError(
            f"These shards take about {need / 1e9:.0f} GB and the disk of {folder} has {free / 1e9:.0f} GB free: "
            "ask for fewer with -n, or set NANOCHAT_BASE_DIR to a larger disk."
        )


def _fetch_all(
    hub: "_Hub", folder: Path, names: list[str], manifest: dict, workers: int, progress: bool | None
) -> dict[str, str]:
    """Fetch with `workers` threads, keeping the manifest and the bar up to date; returns {failed name: reason}."""
    failed: dict[str, str] = {}
    in_a_row = 0

    def attempt(name: str) -> dict:
        nonlocal in_a_row
        if in_a_row >= GIVE_UP:
            return {"reason": "not tried after so many failures"}
        entry = hub.shard(folder, name)
        in_a_row = in_a_row + 1 if "reason" in entry else 0
        return entry

    with ThreadPoolExecutor(workers) as pool, _bar(len(names), progress) as bar:
        jobs = {pool.submit(attempt, name): name for name in names}
        try:
            for job in _as_done(jobs, bar, hub):
                entry = job.result()
                if "reason" in entry:
                    failed[jobs[job]] = entry["reason"]
                else:
                    manifest["files"][jobs[job]] = entry
        finally:
            hub.stop.set()  # for Ctrl-C: transfers under way end within a chunk, what they got stays
            pool.shutdown(wait=True, cancel_futures=True)
            write_manifest(folder, manifest | {"files": dict(sorted(manifest["files"].items()))})
    return failed


def _as_done(jobs: dict[Future, str], bar: Any, hub: "_Hub") -> Iterator[Future]:
    """The jobs as they finish; between them the bar tells what has arrived."""
    waiting = set(jobs)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        bar.set_postfix_str(f"{hub.received / 1e6:,.0f} MB", refresh=True)
        for job in done:
            bar.update()
            yield job


def _bar(total: int, progress: bool | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="shard", desc="shards", disable=None if progress is None else not progress)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub library's own bar a file would fight with ours."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars("huggingface_hub.http_get")
    try:
        yield
    finally:
        enable_progress_bars("huggingface_hub.http_get")


class _Damaged(Exception):
    """The transfer ended and the file is not what the hub says it is."""


@dataclass(frozen=True)
class _File:
    """What the hub says of a file: bytes, checksum (None if it keeps none), commit."""

    size: int
    sha256: str | None
    commit: str


class _Sink(io.FileIO):
    """A file that counts what is appended and takes nothing more once the download is stopped."""

    def __init__(self, path: Path, hub: "_Hub"):
        super().__init__(path, "ab")
        self.hub = hub

    def write(self, data: Any) -> int:
        if self.hub.stop.is_set():
            raise _Damaged("stopped")
        written = super().write(data)
        self.hub.received += written
        return written


class _Hub:
    """One data set on the hub, and the transfers from it."""

    def __init__(self, repo: str, endpoint: str | None):
        from huggingface_hub.errors import HfHubHTTPError

        self.repo = repo
        self.endpoint = endpoint
        self.commit = ""
        self.received = 0  # bytes, about: threads add to it without a lock
        self.stop = threading.Event()
        # The library's HTTP client has changed its name twice; its root error is the first base of the hub's own.
        self.troubles = (OSError, *HfHubHTTPError.__bases__, _Damaged)

    def _url(self, name: str, revision: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, repo_type="dataset", revision=revision, endpoint=self.endpoint)

    def look(self, name: str, revision: str) -> _File:
        """Ask the hub for a file's size, checksum and commit (large-file metadata)."""
        from huggingface_hub import get_hf_file_metadata

        found = get_hf_file_metadata(self._url(name, revision), endpoint=self.endpoint)
        if found.size is None or found.commit_hash is None:
            raise _Damaged("the answer is not a Hugging Face hub's, it has no size or no commit")
        known = found.etag if re.fullmatch("[0-9a-f]{64}", found.etag or "") else None
        return _File(found.size, known, found.commit_hash)

    def first_look(self, name: str, revision: str) -> _File:
        """Like `look`, where failing means that nothing can be fetched."""
        try:
            return self.look(name, revision)
        except self.troubles as error:
            raise UserError(
                f"The hub's {self.repo} at revision {revision} can't be reached ({_reason(error)}): check the network, "
                "HF_ENDPOINT and --revision, or use `--dataset tinyworld`, which needs no download."
            ) from error

    def shard(self, folder: Path, name: str) -> dict:
        """Fetch one shard, trying again; {"size", "sha256"}, or {"reason"} if it failed for good."""
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt and self.stop.wait(FIRST_WAIT * 2 ** (attempt - 1)):
                break
            try:
                return self._attempt(folder / name, folder / f".{name}.partial")
            except self.troubles as error:
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise UserError(f"The disk of {folder} is full: free some space and run again.") from error
                reason = _reason(error)
                if getattr(getattr(error, "response", None), "status_code", None) in FINAL:
                    break
        return {"reason": reason}

    def _attempt(self, path: Path, partial: Path) -> dict:
        wanted = self.look(path.name, self.commit)
        if path.exists() and wanted.sha256 and sha256(path) == wanted.sha256:
            return {"size": wanted.size, "sha256": wanted.sha256}
        self._transfer(path.name, partial, wanted)
        digest = sha256(partial)
        if partial.stat().st_size != wanted.size or wanted.sha256 not in (None, digest):
            partial.unlink()
            raise _Damaged("it arrived damaged: its size or checksum is not the hub's")
        os.replace(partial, path)
        return {"size": wanted.size, "sha256": digest}

    def _transfer(self, name: str, partial: Path, wanted: _File) -> None:
        """Append to `partial` what it lacks."""
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        if partial.exists() and partial.stat().st_size > wanted.size:
            partial.unlink()
        with io.BufferedWriter(_Sink(partial, self)) as file:
            here = file.tell()
            http_get(
                self._url(name, self.commit),
                file,
                resume_size=here,
                headers=build_hf_headers(),
                expected_size=wanted.size,
            )
            file.flush()
            os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    """One line of an error that may have many."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
