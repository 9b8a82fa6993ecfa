"""The downloader against a small server that behaves like the hub: broken, damaged, missing, resumed transfers."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import download, manifest
from nanochat.dataset import HUB, HubCorpus, open_corpus
from nanochat.errors import UserError

SOURCE = HubCorpus("someone/some-shuffle", 5, "base_data_some")
COMMIT, OLDER = "c" * 40, "b" * 40


def parquet(text):
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"text": [f"{text} {i} {hashlib.sha256(bytes([i])).hexdigest()}" for i in range(200)]}), sink
    )
    return sink.getvalue()


class Hub:
    """Files of one data set, the faults to show for each, and a log of what was asked."""

    def __init__(self, source):
        names = [source.shard(i) for i in range(source.train_shards + 1)]
        self.repo, self.files = source.repo, {name: parquet(name) for name in names}
        self.faults = {}  # name -> list of "break", "damage", "gone", "slow"; one is used up by each GET
        self.asked = []  # (method, name, first byte)
        self.commits = {"main": COMMIT, COMMIT: COMMIT, "old": OLDER, OLDER: OLDER}

    def handler(hub):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, headers, body=b"", length=None):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body)

            def find(self):
                match = re.fullmatch(rf"/datasets/{hub.repo}/resolve/([^/]+)/([^/]+)", self.path)
                if not match or match[1] not in hub.commits or match[2] not in hub.files:
                    self.answer(404, {"X-Error-Code": "EntryNotFound"})
                    return None, None
                return match[2], hub.commits[match[1]]

            def do_HEAD(self):
                name, commit = self.find()
                if name:
                    hub.asked.append(("HEAD", name, 0))
                    data = hub.files[name]
                    headers = {
                        "X-Repo-Commit": commit,
                        "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                        "X-Linked-Size": str(len(data)),
                        "ETag": '"git"',
                        "Location": f"{hub.cdn}/cdn/{name}",  # the large files lie on another host
                    }
                    self.answer(302, headers, length=0)

            def do_GET(self):
                if self.path.startswith("/datasets/"):
                    name, _ = self.find()
                    if name:
                        self.answer(302, {"Location": f"{hub.cdn}/cdn/{name}"})
                    return
                name = self.path.removeprefix("/cdn/")
                if name not in hub.files:
                    self.answer(404, {})
                    return
                first = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
                hub.asked.append(("GET", name, first))
                fault = hub.faults[name].pop(0) if hub.faults.get(name) else None
                data = hub.files[name]
                if fault == "gone":
                    self.answer(503, {})
                    return
                if fault == "damage":
                    data = data[:50] + bytes(20) + data[70:]
                headers = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
                body = data[first:]
                if fault == "break":
                    self.answer(206 if first else 200, headers, body[: len(body) // 2], length=len(body))
                    self.close_connection = True
                else:
                    self.answer(206 if first else 200, headers, body)

        return Handler


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB for shards of 100 MB
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    hub = Hub(SOURCE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.endpoint, hub.cdn = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def get(hub, folder, *indices, **options):
    names = [SOURCE.val_shard, *(SOURCE.shard(i) for i in indices)]
    return download.fetch(SOURCE, folder, names, endpoint=hub.endpoint, **options)


def test_shards_arrive_whole_with_a_manifest_that_makes_the_folder_a_corpus(hub, tmp_path, base_dir):
    report = get(hub, tmp_path, 0, 1)
    assert report["revision"] == COMMIT
    for name in report["files"]:
        assert (tmp_path / name).read_bytes() == hub.files[name]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["val_shard"] == SOURCE.val_shard and manifest["revision"] == COMMIT
    assert manifest["files"][SOURCE.val_shard] == {
        "size": len(hub.files[SOURCE.val_shard]),
        "sha256": hashlib.sha256(hub.files[SOURCE.val_shard]).hexdigest(),
    }
    assert open_corpus(str(tmp_path)).shards("val") == [SOURCE.val_shard]
    assert not list(tmp_path.glob(".*partial"))


def test_what_is_here_is_not_fetched_again_and_more_can_be_added(hub, tmp_path):
    get(hub, tmp_path, 0)
    hub.asked.clear()
    get(hub, tmp_path, 0, 1)
    assert [name for method, name, _ in hub.asked if method == "GET"] == [SOURCE.shard(1)]


def test_a_shard_copied_here_by_hand_is_checked_and_kept_or_replaced(hub, tmp_path):
    (tmp_path / SOURCE.shard(0)).write_bytes(hub.files[SOURCE.shard(0)])
    (tmp_path / SOURCE.shard(1)).write_bytes(hub.files[SOURCE.shard(1)][:-1] + b"?")
    get(hub, tmp_path, 0, 1)
    fetched = [name for method, name, _ in hub.asked if method == "GET"]
    assert SOURCE.shard(0) not in fetched and SOURCE.shard(1) in fetched
    assert (tmp_path / SOURCE.shard(1)).read_bytes() == hub.files[SOURCE.shard(1)]


def test_a_broken_transfer_goes_on_where_it_stopped_pitfall_10(hub, tmp_path):
    name = SOURCE.shard(0)
    hub.faults[name] = ["break"]
    get(hub, tmp_path, 0)
    starts = [first for method, asked, first in hub.asked if (method, asked) == ("GET", name)]
    assert starts[0] == 0 and len(starts) == 2 and 0 < starts[1] < len(hub.files[name])
    assert (tmp_path / name).read_bytes() == hub.files[name]


def test_a_partial_file_of_a_killed_run_is_finished_and_never_taken_for_whole_pitfall_10(hub, tmp_path):
    name = SOURCE.shard(0)
    (tmp_path / f".{name}.partial").write_bytes(hub.files[name][:1000])
    get(hub, tmp_path, 0)
    assert ("GET", name, 1000) in hub.asked and (tmp_path / name).read_bytes() == hub.files[name]
    other = SOURCE.shard(1)
    (tmp_path / f".{other}.partial").write_bytes(b"something else" * 50)  # a wrong beginning: found, fetched anew
    get(hub, tmp_path, 1)
    assert (tmp_path / other).read_bytes() == hub.files[other]


def test_a_damaged_transfer_is_noticed_and_repeated(hub, tmp_path):
    name = SOURCE.shard(0)
    hub.faults[name] = ["damage", "gone"]
    get(hub, tmp_path, 0)
    assert (tmp_path / name).read_bytes() == hub.files[name]


def test_shards_that_fail_for_good_are_named_and_nothing_half_stays_pitfall_11(hub, tmp_path):
    hub.faults = {SOURCE.shard(0): ["damage"] * 5, SOURCE.shard(2): ["gone"] * 50}
    with pytest.raises(UserError) as error:
        get(hub, tmp_path, 0, 1, 2)
    message = str(error.value)
    assert message.startswith("2 of 4 shards failed; run the same command again")
    assert f"{SOURCE.shard(0)}: it arrived damaged" in message and f"{SOURCE.shard(2)}: " in message
    here = {path.name for path in tmp_path.glob("*.parquet")}
    assert here == {SOURCE.val_shard, SOURCE.shard(1)}
    hub.faults.clear()
    get(hub, tmp_path, 0, 1, 2)  # goes on with just those
    assert {path.name for path in tmp_path.glob("*.parquet")} == here | {SOURCE.shard(0), SOURCE.shard(2)}


def test_a_file_the_hub_does_not_have_fails_at_once(hub, tmp_path):
    del hub.files[SOURCE.shard(3)]
    with pytest.raises(UserError, match=f"1 of 2 shards failed.*\n  {SOURCE.shard(3)}: .*404"):
        get(hub, tmp_path, 3)


def test_after_many_failures_in_a_row_the_rest_is_not_tried(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "GIVE_UP", 2)
    for index in range(5):
        del hub.files[SOURCE.shard(index)]
    with pytest.raises(UserError, match="not tried after so many failures") as told:
        get(hub, tmp_path, 0, 1, 2, 3, 4, workers=1)
    assert all(SOURCE.shard(index) in str(told.value) for index in range(5))  # those not tried are missing too


def test_the_first_commit_is_kept_and_another_revision_refused(hub, tmp_path):
    get(hub, tmp_path, 0, revision="old")
    hub.commits["main"] = "d" * 40
    assert get(hub, tmp_path, 1)["revision"] == OLDER  # later runs stay, though the branch has moved
    with pytest.raises(UserError, match="--revision=main is another"):
        get(hub, tmp_path, 2, revision="main")


def test_a_known_commit_is_where_a_first_download_begins_pitfall_11(hub, tmp_path):
    known = dataclasses.replace(SOURCE, revision=OLDER)
    names = [SOURCE.val_shard]
    assert download.fetch(known, tmp_path / "a", names, endpoint=hub.endpoint)["revision"] == OLDER
    asked = download.fetch(known, tmp_path / "b", names, endpoint=hub.endpoint, revision="main")
    assert asked["revision"] == COMMIT
    with pytest.raises(UserError, match="at revision gone can't be reached"):
        download.fetch(dataclasses.replace(SOURCE, revision="gone"), tmp_path / "c", names, endpoint=hub.endpoint)
    assert re.fullmatch("[0-9a-f]{40}", HUB["climbmix"].revision)


def test_a_disk_too_small_is_refused_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="GB free: ask for fewer with -n"):
        get(hub, tmp_path, 0)
    assert not [entry for entry in hub.asked if entry[0] == "GET"]


def test_two_downloads_into_one_folder_do_not_mix(hub, tmp_path, capsys):
    """The second waits and says so: a recipe that was killed may have left the first one running."""
    with ThreadPoolExecutor(1) as pool:
        with manifest.lock(tmp_path):
            second, said = pool.submit(get, hub, tmp_path, 0), ""
            while "is under way: waiting" not in said and not second.done():
                time.sleep(0.02)
                said += capsys.readouterr().out
            assert not second.done() and not hub.asked
        assert second.result(timeout=60)["revision"] == COMMIT


def test_progress_is_shown_pitfall_51(hub, tmp_path, capsys):
    get(hub, tmp_path, 0, 1, progress=True)
    shown = capsys.readouterr().err
    assert "shards: 100%" in shown and "3/3" in shown and "MB" in shown


def test_stopping_keeps_what_has_arrived(hub, tmp_path):
    from nanochat.download import _Hub

    name = SOURCE.shard(0)
    one = _Hub(SOURCE.repo, hub.endpoint)
    one.commit = COMMIT
    one.stop.set()
    assert "stopped" in one.shard(tmp_path, name)["reason"]
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"dataset": "tinyworld"}, "nothing to download for --dataset=tinyworld"),
        ({"num_files": 9999}, "6542 training shards: give -n from 0"),
        ({"num_files": -2}, "give -n from 0"),
        ({"num_workers": 0}, "-w 1 or more"),
    ],
)
def test_wrong_flags_are_refused(base_dir, config, sentence):
    with pytest.raises(UserError, match=sentence):
        download.main(download.Config(**config))


def command(hub, base_dir, *flags):
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "NANOCHAT_BASE_DIR": str(base_dir)}
    argv = [sys.executable, "-m", "nanochat.dataset", *flags]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_command_honours_hf_endpoint_and_its_exit_status_tells_pitfall_11(hub, base_dir):
    hub.repo, known = "karpathy/climbmix-400b-shuffle", HUB["climbmix"].revision
    hub.commits = {known: known}  # and no main: a first download does not ask what is newest
    hub.files["shard_06542.parquet"] = parquet("validation")
    done = command(hub, base_dir, "-n", "2", "-w", "2", "--dataset", "climbmix")
    assert done.returncode == 0 and "3 shards of climbmix are complete" in done.stdout, done.stderr
    here = sorted(path.name for path in (base_dir / "base_data_climbmix").glob("*.parquet"))
    assert here == ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    del hub.files["shard_00002.parquet"]
    done = command(hub, base_dir, "-n", "3")
    assert done.returncode == 1 and done.stderr.startswith("error: 1 of 4 shards failed")
    assert "shard_00002.parquet" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_hub_out_of_reach_is_one_sentence(base_dir, tmp_path):
    class Nowhere:
        endpoint = "http://127.0.0.1:9"

    done = command(Nowhere, base_dir, "-n", "1")
    assert done.returncode == 1 and "can't be reached" in done.stderr and "--dataset tinyworld" in done.stderr
    assert "Traceback" not in done.stderr
