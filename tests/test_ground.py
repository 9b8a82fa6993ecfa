"""The ground layer: paths, runtime, hardware, record, command line."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import cli, hardware, paths, record, runtime
from nanochat.errors import Stopped, UserError, refuse

ROOT = Path(__file__).resolve().parents[1]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.json"
    paths.write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), paths.atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert paths.read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_others_write_takes_its_place_whole_or_leaves_nothing(tmp_path):
    """A file, one with another beside it, a folder that replaces a folder; and a failure in the midst of each."""
    with paths.staged(tmp_path / "a.bin") as place:
        place.write_text("one")
        place.with_name("a.bin.data").write_text("two")
    with paths.staged(tmp_path / "folder") as place:
        place.mkdir()
        (place / "old").write_text("")
    with paths.staged(tmp_path / "folder") as place:
        place.mkdir()
        (place / "new").write_text("")
    with pytest.raises(KeyboardInterrupt), paths.staged(tmp_path / "a.bin") as place:
        place.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.bin").read_text() == "one" and (tmp_path / "a.bin.data").read_text() == "two"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "a.bin", "a.bin.data", "folder", "folder/new"]  # fmt: skip


@pytest.mark.parametrize("inside", [True, False])
def test_a_full_disk_names_the_place_that_was_meant_not_the_temporary_one(tmp_path, monkeypatch, inside):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError) as caught, paths.staged(tmp_path / "out") as place:
        if not inside:
            raise full
        place.mkdir()
        monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(full))
        paths.write_json(place / "config.json", {})
    assert str(caught.value).startswith(f"{tmp_path / 'out'} can't be written") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_is_a_sentence_and_nothing_is_written_half(tmp_path, monkeypatch, number):
    path = tmp_path / "a.json"
    paths.write_json(path, {"x": 1})

    def full(_handle):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"a\.json can't be written \(.*run this again"):
        patch.setattr(os, "fsync", full)
        paths.write_json(path, {"x": 2})
    assert paths.read_json(path) == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(UserError, match="can't be written"):
        paths.write_json(tmp_path / "a.json" / "below" / "b.json", 1)


def test_an_error_of_who_writes_stays_what_it_is(tmp_path):
    with pytest.raises(ConnectionResetError), paths.atomic_write(tmp_path / "a"):
        raise ConnectionResetError(errno.ECONNRESET, "the other side is gone")


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError):
        paths.write_json(tmp_path / "a.json", {"x": float("inf")})
    (tmp_path / "b.json").write_text('{"x":')
    with pytest.raises(UserError, match=r"b\.json is not valid JSON"):
        paths.read_json(tmp_path / "b.json")


def test_base_dir_is_honoured(base_dir):
    assert paths.base_dir() == base_dir


def test_unknown_dtype_is_one_sentence(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float8")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE=float8 is unknown"):
        runtime.pick_dtype(torch.device("cpu"))


def test_a_cpu_trains_in_bf16_only_where_it_multiplies_it_and_answers_in_fp32(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(runtime, "cpu_has_fast_bf16", lambda fast=fast: fast)
        assert runtime.pick_dtype(torch.device("cpu"), training=True)[0] == wanted
        assert runtime.pick_dtype(torch.device("cpu"))[0] == torch.float32


@pytest.mark.parametrize(
    ("amx", "dots", "vendor", "fast"),
    [(True, True, "GenuineIntel", True), (False, True, "GenuineIntel", False), (False, True, "AuthenticAMD", True),
     (False, False, "AuthenticAMD", False), (False, True, "", True)],
)  # fmt: skip
def test_bf16_is_fast_with_amx_or_with_dot_products_that_are_not_intels(monkeypatch, amx, dots, vendor, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dots, raising=False)
    monkeypatch.setattr(runtime, "cpu_vendor", lambda: vendor)
    assert runtime.cpu_has_fast_bf16() is fast


def test_unknown_or_absent_device_is_one_sentence():
    with pytest.raises(UserError, match="unknown"):
        runtime.pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no such device"):
            runtime.pick_device("cuda")


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_one_sentence(seed):
    with pytest.raises(UserError, match=f"--seed={seed} must be 0 to"):
        runtime.start("cpu", seed)


def test_unknown_device_has_no_peak():
    assert hardware.peak_flops("Frob 9000") is None
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert hardware.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert hardware.peak_bandwidth("NVIDIA H200") == 4.8e12


def test_record_rows_survive_a_resume_and_a_torn_line(tmp_path):
    path = tmp_path / "record.jsonl"
    first = record.Record(path, stage="base", config={})
    for step in range(4):
        first.step(step, loss=float(step))
    with path.open("a") as file:
        file.write('{"kind": "st\n')  # killed here
    second = record.Record(path, stage="base", config={}, resume_step=2)
    second.step(2, loss=20.0)
    second.close(best=float("nan"))
    rows = record.read(path)
    assert [(r["step"], r["loss"]) for r in rows if r["kind"] == "step"] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert rows[-1]["kind"] == "summary" and rows[-1]["best"] is None
    json.loads(path.read_text().splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_damaged_lines_of_a_record_are_left_out_and_the_rest_is_read(tmp_path):
    log = record.Record(tmp_path / "r.jsonl", stage="base", config={})
    log.step(0, loss=2.0)
    with open(tmp_path / "r.jsonl", "ab") as file:
        file.write(b"\xff\xfe\x00\n7\n[1]\n{}\n")
    log.step(1, loss=1.0)
    log.event("sample", text="other\u2028ends\x85of\x1clines\r")
    log.event("sample", text="half a pair: \ud800")  # what JSON can say and UTF-8 can't
    *rows, sample, half = record.read(tmp_path / "r.jsonl")
    assert [row.get("loss") for row in rows] == [None, 2.0, 1.0] and sample["text"].endswith("lines\r")
    assert half["text"] == "half a pair: ?"


def test_a_record_tells_why_a_run_ended_but_not_that_it_was_asked_to_stop(tmp_path):
    path = tmp_path / "record.jsonl"
    with pytest.raises(UserError), record.Record(path, stage="base", config={}):
        raise UserError("Step 7: the loss is nan.")
    last = record.read(path)[-1]
    assert (last["kind"], last["error"], last["message"]) == ("failed", "UserError", "Step 7: the loss is nan.")
    with pytest.raises(Stopped), record.Record(path, stage="base", config={}):
        raise Stopped(15, "saved")
    assert [row["kind"] for row in record.read(path)] == ["start"]


@pytest.mark.slow
def test_wandb_works_offline_without_an_account_pitfall_46(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = record.Record(tmp_path / "record.jsonl", stage="base", config={}, run="try")
    run.step(0, loss=1.0)
    run.close()
    assert (tmp_path / "wandb").is_dir()


@pytest.mark.slow
def test_wandb_out_of_reach_costs_the_curve_on_line_and_not_the_run_pitfall_46(tmp_path, monkeypatch, capsys):
    from wandb.errors import CommError

    asked = []

    def init(**options):
        asked.append(options["mode"])
        if options["mode"] == "online":
            raise CommError("dial tcp: no such host\nConsider increasing the init_timeout setting")
        return SimpleNamespace(id="x", finish=lambda: None)

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.delenv("WANDB_MODE")
    assert record.Record(tmp_path / "r.jsonl", stage="base", config={}, run="try").wandb_id == "x"
    assert asked == ["online", "offline"]
    assert "note: wandb is not to be had (dial tcp: no such host): logging offline" in capsys.readouterr().out


def test_a_resumed_run_goes_on_in_the_same_wandb_run_pitfall_8(tmp_path, monkeypatch):
    """Its id is in the record and goes into every checkpoint; the published code begins a new run each time."""
    asked = []

    def init(**options):
        asked.append(options)
        return SimpleNamespace(id=options.get("id") or "new1", finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    first = record.Record(tmp_path / "r.jsonl", stage="base", config={}, run="try")
    assert first.wandb_id == "new1" and "id" not in asked[0]
    record.Record(tmp_path / "r.jsonl", stage="base", config={}, run="try", resume_step=3, wandb_id=first.wandb_id)
    assert (asked[1]["id"], asked[1]["resume"]) == ("new1", "allow")
    assert [row["wandb"] for row in map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())] == ["new1"] * 2
    assert record.Record(tmp_path / "r.jsonl", stage="base", config={}).wandb_id is None


def test_a_full_disk_costs_rows_of_the_record_not_the_run(tmp_path, monkeypatch, capsys):
    log = record.Record(tmp_path / "r.jsonl", stage="base", config={})
    real = open

    def full(path, mode="r", **options):
        if mode == "a":
            with real(path, mode, **options) as file:
                file.write('{"kind": "st')  # what still fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        for step in (1, 2):
            log.step(step, loss=1.0)
    log.step(3, loss=1.0)
    assert capsys.readouterr().out.count("can't be written (No space left on device)") == 1
    assert [row.get("step") for row in record.read(tmp_path / "r.jsonl")] == [None, 3]


def test_a_rollback_supersedes_what_came_after_its_step(tmp_path):
    log = record.Record(tmp_path / "r.jsonl", stage="base", config={})
    for step in range(4):
        log.step(step, loss=1.0)
    log.event("rollback", step=2)
    log.step(2, loss=2.0)
    rows = [row for row in record.read(tmp_path / "r.jsonl") if row["kind"] == "step"]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1.0), (1, 1.0), (2, 2.0)]


def test_wandb_is_not_imported_for_a_dummy_run_pitfall_46(tmp_path):
    code = (
        "import sys; from nanochat.record import Record; "
        f"Record({str(tmp_path / 'r.jsonl')!r}, stage='x', config={{}}).close(); assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_importing_the_ground_has_no_side_effect_pitfall_50(tmp_path):
    code = "import nanochat.paths, nanochat.runtime, nanochat.record, nanochat.cli"
    home = {"HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=home)
    assert done.stdout == done.stderr == b"" and list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True)
class Config:
    depth: int = 20  # layers
    fp8: bool = False  # fp8 matmuls
    every: int = -1  # steps; -1 = never
    model_tag: str | None = None  # name


def test_published_flag_forms_parse_and_unknown_flags_are_errors(capsys):
    cfg = cli.parse(Config, ["--", "--depth=12", "--every=-1", "--fp8", "--model-tag", "d12"])
    assert cfg == Config(12, True, -1, "d12")
    with pytest.raises(SystemExit) as leave:
        cli.parse(Config, ["--dept=12"])
    assert leave.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("No such tag."), 1), (KeyboardInterrupt(), 130), (Stopped(15, "saved"), 143)]
)
def test_exit_status_says_how_it_ended(error, code, capsys):
    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as leave:
        cli.run(main, Config, [])
    assert leave.value.code == code
    assert "Traceback" not in capsys.readouterr().err


STAGE = """
import signal, sys, time
from dataclasses import dataclass
from nanochat import cli, paths

@dataclass(frozen=True)
class Config:
    path: str = ""  # where

def main(cfg):
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
    with paths.atomic_write(cfg.path) as file:
        file.write(b"half")
        print("ready", flush=True)
        time.sleep(60)

cli.run(main, Config)
"""


@pytest.mark.parametrize(("name", "said"), [("SIGTERM", "stopped by SIGTERM: "), ("SIGINT", "stopped by Ctrl-C: ")])
def test_a_signal_ends_any_stage_with_a_sentence_its_code_and_nothing_half(tmp_path, name, said):
    number = getattr(signal, name)
    command = [sys.executable, "-c", STAGE, f"--path={tmp_path / 'a'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        _, error = child.communicate(timeout=60)
    assert child.returncode == 128 + number and error.startswith(said) and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


COMPILED = """
import ctypes, signal
from nanochat import cli
cli.UNWIND = 0.2
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)  # it would raise, did Python get to it
with cli.interruptible():
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever, and no handler runs: as while rustbpe merges
"""


@pytest.mark.skipif(sys.platform != "linux", reason="blocks on glibc's mutex")
@pytest.mark.parametrize(("name", "said"), [("SIGTERM", "stopped by SIGTERM: "), ("SIGINT", "stopped by Ctrl-C: ")])
def test_a_signal_is_heard_in_compiled_code_where_asked(name, said):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", COMPILED], **pipes) as p:
        assert p.stdout.readline() == "ready\n"
        p.send_signal(getattr(signal, name))
        _, error = p.communicate(timeout=60)
    assert p.returncode == 128 + getattr(signal, name) and error.strip().startswith(said)


def test_python_code_unwinds_by_itself_where_signals_are_heard(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), cli.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    with cli.interruptible():
        pass
    assert signal.set_wakeup_fd(-1) == -1  # as it was


@pytest.mark.parametrize(("program", "library"), [("scripts.plan", "torch"), ("nanochat.dataset", "pyarrow")])
def test_ctrl_c_while_a_program_imports_its_libraries_is_no_traceback(tmp_path, program, library):
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # the background ignores it
    (tmp_path / f"{library}.py").write_text(f"{heard}\nimport time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT and error == "stopped by Ctrl-C.\n"


def test_a_rank_dies_of_sigterm_even_where_it_waits_for_another(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    seen = []
    cli.run(lambda cfg: seen.append(signal.getsignal(signal.SIGTERM)), Config, [])
    assert seen == [signal.SIG_DFL]


@dataclasses.dataclass(frozen=True)
class Sizes:
    size: int = 3  # of something
    rate: float = 0.5  # of something else
    rows: int | str = -1  # a number or auto


def test_flags_below_their_least_value_are_named():
    assert cli.too_small(Sizes(), ("rows",), size=1, rate=0, rows=1) == []
    found = cli.too_small(Sizes(0, float("nan"), -2), ("rows",), size=1, rate=0, rows=1)
    assert found == [
        "--size=0 must be 1 or more.",
        "--rate=nan must be 0 or more.",
        "--rows=-2 must be 1 or more, or -1.",
    ]
    assert cli.too_small(Sizes(-1, float("inf"), "auto"), ("rows",), size=1, rate=0, rows=1) == [
        "--size=-1 must be 1 or more.", "--rate=inf must be 0 or more."]  # fmt: skip


def test_all_problems_are_told_at_once():
    refuse([])
    with pytest.raises(UserError, match="(?s)2 things.*first.*second"):
        refuse(["first", "second"])


@pytest.mark.slow
def test_collectives_over_gloo(on_ranks):
    on_ranks(
        3,
        """
import torch
from nanochat import runtime
rt = runtime.start("cpu")
assert float(rt.sum(torch.tensor(rt.rank + 1.0))) == 6
assert rt.any(rt.rank == 2) and not rt.any(False)
assert rt.broadcast({"a": [1, "ä"]} if rt.main else None) == {"a": [1, "ä"]}
assert rt.gather({"rank": "x" * rt.rank}) == [{"rank": ""}, {"rank": "x"}, {"rank": "xx"}]
rt.barrier(); runtime.stop(rt)
""",
    )
