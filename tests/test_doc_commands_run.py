"""Every documented command is really run: as it is written, but tiny, in this process; recipes dry.

SMALL says what is made small, once for each program; all other flags stay as documented. Each command runs in a copy of
an artefact folder with tiny models of every stage under the names that the documents use.
"""

import dataclasses
import functools
import importlib
import io
import json
import os
import shutil
import socket
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
from serve_rig import Thread, until
from test_core_eval import write_bundle
from test_doc_commands import sources, statements, target
from test_docs import ROOT, config_of
from test_download import hub, parquet  # noqa: F401  a fixture
from test_recipes_dry import dry
from test_tasks import ARC_ROW, CODE_ROW, GSM_ROW, MMLU_ROW, TALK_ROW, write
from tiny_model import TOKENIZER, save_checkpoint

from nanochat import checkpoint, cli, download, record
from nanochat.dataset import HUB
from nanochat.errors import UserError
from nanochat.serve import server, worker
from scripts import base_train

TRAINING = {"num_iterations": 2, "device_batch_size": 2, "total_batch_size": 256, "eval_tokens": 256}
SERVED = {"depth": 1, "width": 64, "vocab_size": 300, "sequence_len": 256}
SMALL = {  # what sets the size: values in place of those that are documented, except for a 0, which turns something off
    "nanochat.dataset": {"num_files": 2},
    "scripts.tok_train": {"vocab_size": 300, "max_chars": 20_000},
    "scripts.base_train": TRAINING | {"depth": 2, "max_seq_len": 64, "core_metric_max_per_task": 2},
    "scripts.base_eval": {"device_batch_size": 2, "split_tokens": 256, "max_per_task": 2},
    "scripts.chat_sft": TRAINING | {"chatcore_max_cat": 2, "chatcore_max_sample": 2},
    "scripts.chat_rl": {"num_iterations": 2, "device_batch_size": 2, "examples_per_step": 2, "num_samples": 2,
                        "max_new_tokens": 4, "eval_examples": 2, "eval_samples": 2},
    "scripts.chat_eval": {"max_problems": 2, "max_new_tokens": 4},
    "scripts.bench_chat": {"num": 2, "train_documents": 50, "max_new_tokens": 4},
    "scripts.bench_corruption": {"every": 2000},
    "scripts.bench_engine_schedules": {"schedules": 2},
    "scripts.bench_loader": {"seconds": 0.05, "step_ms": 1.0, "device_batch_size": 2, "max_seq_len": 64},
    "scripts.bench_memory": {"only": 0, "steps": 1},
    "scripts.bench_model": {"depth": 1, "vocab_size": 300, "sequence_len": 32, "rows": 1, "turns": 1},
    "scripts.bench_optimizer_memory": {"depths": "2"},
    "scripts.bench_save": {"depth": 1, "vocab_size": 300, "max_seq_len": 16, "batch": 64, "every": 3, "rounds": 1},
    "scripts.bench_serve": SERVED | {"clients": 2, "seconds": 1.0, "warmup": 0.0, "turns": 1, "max_tokens": 4},
    "scripts.bench_text": {"tokens": 256, "rows": 2, "whole": False},
    "scripts.infer_bench": {"depth": 2, "vocab_size": 300, "sequence_len": 64, "prompt_tokens": 8, "decode_tokens": 4,
                            "batch_sizes": "1", "repeats": 1, "hf": False},
    "scripts.repackage": {"shards": 2},
    "scripts.tree": {"readme": "README.md"},  # not the project's own
}  # fmt: skip
NOT_RUN = {  # (program, a word of the command, or "" for all): (what no test here has, the test that has it)
    ("scripts.checkpoints", "convert"): ("a checkpoint of the published code", "test_checkpoints"),
    ("scripts.doctor", "--network"): ("the network", "test_doctor"),
    ("scripts.export", "--push=USER/NAME"): ("an account", "test_export"),
    ("scripts.export", "--import-from=FOLDER"): ("an exported folder", "test_export"),
    ("scripts.export", "--format=onnx"): ("half a minute", "test_export"),
    ("scripts.repackage", "--source=hf:HuggingFaceFW/fineweb-edu"): ("the network", "test_repackage"),
    ("scripts.visualize", "--install"): ("the network", "test_visualize"),
    ("scripts.visualize", "--render=still"): ("node's packages and a browser", "test_visualize"),
    ("scripts.visualize", "--render=video"): ("node's packages and a browser", "test_visualize"),
    ("scripts.bench_abuse", ""): ("minutes", "test_serve_abuse"),
    ("scripts.bench_export", ""): ("half a minute", "test_export"),
    ("scripts.bench_kill", ""): ("a minute", "test_bench_kill"),
    ("scripts.bench_lm_eval", ""): ("an exported folder, measuring data", "test_export"),
    ("scripts.bench_recipe_kill", ""): ("minutes", "test_recipes"),
    ("scripts.bench_serve", "open"): ("a server, as the closed loop has", "test_bench_serve"),
    ("scripts.bench_serve", "soak"): ("a server, as the closed loop has", "test_bench_serve"),
    ("scripts.bench_serve", "scaling"): ("a server, as the closed loop has", "test_bench_serve"),
    ("scripts.bench_worlds", ""): ("a minute", "test_bench_ranks"),
}
REFUSED = {  # a word of the command, or a program: the sentence that this machine may refuse it with
    "--fp8": "--fp8 cannot be used here",
    "--device-type=cuda": "torch sees no such device",
    "GSM8K|HumanEval": "can't isolate code",
    "scripts.bench_overlap": "start this with torchrun",
    "scripts.plan": "--gpu",  # a plan by hours wants to know for which GPU
}
CORPUS = {"dataset": "tinyworld", "val_shard": None}  # of the models that the commands find
TAGS = ("12", "d12", "d4", "pocket", "other", "a", "b", "try_a", "scaling_d4", "miniseries_d4")  # 12 stands for $0


def not_run(module, arguments):
    """Why a command is left out, and the test that does what it does; None if it is run."""
    return next(
        (why for (name, word), why in NOT_RUN.items() if name == module and (not word or word in arguments)), None
    )


def runnable():
    """Each command of ours that is run, once, with the first place that names it."""
    found = {}
    for path, lines in sources():
        for words in statements(lines):
            module, arguments = target(words) or ("", [])
            if module.split(".")[0] in ("scripts", "nanochat") and not not_run(module, arguments):
                variables = tuple(sorted(words.variables.items()))
                found.setdefault((module, tuple(arguments), variables), path.name)
    for (module, arguments, variables), name in found.items():
        yield pytest.param(module, arguments, dict(variables), id=f"{name}: {' '.join([module, *arguments])}"[:90])


# -- what they find ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """A project folder with artefacts: tiny models of every stage and name, their records, corpora, tasks, a series."""
    top = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(top / "base"))
        patch.setitem(TOKENIZER.meta, "dataset", CORPUS)
        for source, folder in checkpoint.FOLDERS.items():
            root = top / "base" / folder
            save_checkpoint(source, tag=TAGS[0], step=300, more=meta(), sequence_len=128)
            write_record(root / TAGS[0] / "record.jsonl", source)
            for tag in TAGS[1:]:
                shutil.copytree(root / TAGS[0], root / tag)
    climbmix = HUB["climbmix"]
    shards = {"shards": ("shard_00000", "shard_00001"), "FOLDER": ("shard_00000", "shard_00001"),
              f"base/{climbmix.folder}": (climbmix.shard(0), climbmix.val_shard)}  # fmt: skip
    for folder, names in shards.items():
        for name in names:
            rows = [{"text": f"Text {i} of {name} in {folder}. " * 20} for i in range(40)]
            write((top / folder / name).with_suffix(".parquet"), rows)
    tasks = {"arc/ARC-Easy_test": ARC_ROW, "mmlu/test": MMLU_ROW, "gsm8k/test": GSM_ROW, "humaneval/test": CODE_ROW}
    for name, row in tasks.items():
        write(top / "tasks" / f"{name}.parquet", [row] * 4)
    (top / "tasks" / "words_alpha.txt").write_text("strawberry\nplum\nfig\n")
    shutil.make_archive(top / "eval_bundle", "zip", write_bundle(top).parent, "eval_bundle")
    for name in ("identity", "strawberry"):
        (top / f"{name}.jsonl").write_text(json.dumps(TALK_ROW["messages"]) + "\n")
    for name in ("CLAUDE.md", "README.md"):
        shutil.copy(ROOT / name, top)
    shutil.copy(ROOT / "nanochat" / "prices.csv", top / "my_prices.csv")
    (top / "miniseries.csv").write_text("depth,flops,val_bpb\n4,1e12,1.0\n6,1e13,0.9\n")
    for name in ("nanochat", "scripts"):  # paths of the project
        (top / name).symlink_to(ROOT / name)
    return top


def meta():
    """What a checkpoint says of the run it is of, as far as the next stage reads it."""
    cfg = dataclasses.replace(base_train.Config(), **SMALL["scripts.base_train"])
    plan = record.plain(base_train.make_plan(cfg, TOKENIZER.vocab_size, 1))
    return {"dataset": CORPUS, "user_config": dataclasses.asdict(cfg), "plan": plan}


def write_record(path, stage):
    """The record of a short run that has ended."""
    log = record.Record(path, stage=stage, config={})
    config = {"n_layer": 3, "n_embd": 32, "vocab_size": 265}
    log.event("plan", plan={"config": config, "parameters": {"total": 9, "scaling": 5}, "batch": 8, "iterations": 40,
                            "tokens": 320, "flops": 1e9}, dtype="float32")  # fmt: skip
    for step in range(40):
        log.step(step, loss=5.0 / (step + 1), smooth_loss=5.0 / (step + 1), lr=1.0, grad_norm=0.1, seconds=0.1,
                 tokens_per_second=80.0)  # fmt: skip
    log.eval(40, val_bpb=1.5)
    log.close(seconds=4.0, val_bpb=1.5, tokens_per_second=80.0)


def link(source, copy):
    """A file that a command may append to is copied, any other is replaced whole by whoever writes it: linked."""
    return shutil.copy2(source, copy) if source.endswith(".jsonl") else os.link(source, copy)


def listen(app, pool, host, port, drain):
    """In place of server.run: engines as threads, a free port of this machine, one look from outside, and the end."""
    for one in pool.workers:
        one.start = Thread(worker.load(one.order)).start
    config = server.config_of(app, host, port)
    assert (config.host, config.port) == (host, port)
    front = server.Server(config, pool, drain)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=front.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: front.started and pool.ready)
            health = httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/health").json()
        finally:
            front.should_exit = True
            thread.join(20)
    assert health["ready"] and health["available_workers"] == len(pool.workers) and not thread.is_alive()


def no_net(_name):
    """In place of a fetch."""
    raise ConnectionError


@pytest.fixture
def here(artefacts, tmp_path, monkeypatch):
    """A copy of the artefact folder as the current one; a person who types quit; servers that end by themselves."""
    folder = tmp_path / "here"
    shutil.copytree(artefacts, folder, symlinks=True, copy_function=link)
    monkeypatch.chdir(folder)
    for name, place in (("BASE_DIR", "base"), ("TASKS_DIR", "tasks"), ("EVAL_BUNDLE", "eval_bundle")):
        monkeypatch.setenv(f"NANOCHAT_{name}", str(folder / place))
    monkeypatch.setattr(sys, "stdin", io.StringIO("quit\n"))
    monkeypatch.setattr(server, "run", listen)
    monkeypatch.setattr("tiktoken.get_encoding", no_net)
    yield folder
    torch.set_num_threads(1)
    if "wandb" in sys.modules:  # its session would keep this folder for the tests that follow
        sys.modules["wandb"].teardown()


# -- running -----------------------------------------------------------------------------------------------------------


def tiny(module, arguments):
    """The Config of a documented command with the sizes of SMALL, on a CPU unless it asks for another device."""
    cfg = cli.parse(config_of(module), list(arguments))
    small = {name: value for name, value in SMALL.get(module, {}).items() if getattr(cfg, name) != 0}
    if getattr(cfg, "device_type", None) == "":
        small["device_type"] = "cpu"
    return dataclasses.replace(cfg, **small)


def stop_before(script, cfg):
    """Leave what the same command without --resume and --force has saved half way, as if it had been stopped there."""
    rate = script.Config.matrix_lr if cfg.force else cfg.matrix_lr
    first = dataclasses.replace(cfg, resume=False, force=False, save_every=1, matrix_lr=rate)
    shutil.rmtree(script.main(first)["checkpoint"])


def perform(module, arguments, stopped=True):
    """Run a command; what it returns, or None where it was refused with the sentence that REFUSED knows.

    One with --resume finds what a first life has left, if it is to have been `stopped`.
    """
    script = importlib.import_module("nanochat.download" if module == "nanochat.dataset" else module)
    cfg = tiny(module, arguments)
    resumed = stopped and getattr(cfg, "resume", False)
    if resumed:
        stop_before(script, cfg)
    try:
        result = script.main(cfg)
    except UserError as error:
        if not any(word in (module, *arguments) and said in str(error) for word, said in REFUSED.items()):
            raise
        return None
    if resumed:
        rows = record.read(Path(result["checkpoint"]).parent / "record.jsonl")
        assert [row["resume_step"] for row in rows if row["kind"] == "start"][-1] == 1
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("module", "arguments", "variables"), list(runnable()))
def test_every_command_really_runs(module, arguments, variables, here, hub, monkeypatch, capsys):  # noqa: F811
    for name, value in variables.items():
        monkeypatch.setenv(name, value if name != "NANOCHAT_BASE_DIR" else str(here / "base"))
    corpus = HUB["climbmix"]
    hub.repo, hub.commits = corpus.repo, {corpus.revision: corpus.revision}
    hub.files[corpus.val_shard] = parquet("validation")
    monkeypatch.setattr(download, "fetch", functools.partial(download.fetch, endpoint=hub.endpoint))
    result = perform(module, arguments)
    assert result is None or capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["POCKET=1 bash runs/speedrun.sh", "DATASET=tinyworld bash runs/runcpu.sh"])
def test_a_recipe_for_a_cpu_runs_from_nothing_to_its_report(call, here, monkeypatch):
    """Each of its commands tiny, in its order, each stage on what the one before has left."""
    (words,) = statements([call])
    told = dry(here / "dry", words, words[1], 0)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(here / "fresh"))
    for module, arguments in filter(None, map(target, told)):
        assert perform(module, arguments, stopped=False), module
    assert (here / "fresh" / "report" / "report.html").exists()


WRONG = (  # values that only running can notice
    ("scripts.tok_train", "--dataset=nowhere"),
    ("scripts.base_train", "--window-pattern=Q"),
    ("scripts.base_eval", "--model-tag=d99"),
    ("scripts.chat_sft", "--identity=nobody.jsonl"),
    ("scripts.chat_rl", "--task=chess"),
    ("scripts.chat_eval", "-a", "ARC-Medium"),
    ("scripts.chat_cli", "-p", "Hi", "-i", "xl"),
    ("scripts.chat_web", "-i", "sft,xl"),
    ("scripts.bench_loader", "--mode=chop"),
    ("scripts.infer_bench", "-i", "xl"),
)


@pytest.mark.slow
@pytest.mark.parametrize("command", WRONG, ids=" ".join)
def test_a_wrong_value_is_noticed(command, here):
    with pytest.raises(UserError):
        perform(command[0], command[1:])


def test_what_is_not_run_here_is_run_elsewhere():
    for (module, _), (_, test) in NOT_RUN.items():
        assert module.removeprefix("scripts.") in (ROOT / "tests" / f"{test}.py").read_text(), f"{test}: {module}"
