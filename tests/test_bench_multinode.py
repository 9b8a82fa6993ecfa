"""A host that dies in mid-run and comes back: two network namespaces, two disks, one run (pitfalls 8 and 14)."""

import json
import os
import socket
import subprocess
import time

import pytest

from nanochat.tokenizer import Tokenizer
from scripts import bench_multinode
from scripts.bench_multinode import Config, Hosts


@pytest.mark.slow
def test_a_host_that_is_killed_and_brought_back_changes_nothing_pitfall_8(tmp_path):
    """Steps taken again after the restart give the very loss they gave before; the lost host is sent the checkpoint."""
    reason = bench_multinode.why_not()
    if reason:
        pytest.skip(f"two hosts can't be made here: {reason}")
    Tokenizer.from_ranks([bytes([i]) for i in range(256)]).save(tmp_path / "tokenizer")
    cfg = Config(steps=62, save_every=30, down=0.0)  # killed after step 31, well before the checkpoint of step 60
    with Hosts(7) as hosts:
        found = bench_multinode.train_on(hosts, tmp_path / "run", cfg, kills=1)
    assert len(found["killed"]) == 1 and found["exit_codes"] == [0, 0]
    assert len(found["losses"]) == cfg.steps and found["steps_taken_twice"] == found["of_those_equal"] > 0
    assert found["checkpoints_sent"]


def listens(port):
    """Does somebody answer there?"""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_the_recipe_brings_two_machines_together(tmp_path):
    """runs/multinode.sh twice on this machine: the first to come hosts the meeting, both agree on every collective.
    Where two hosts can be made they meet in the test above, which needs root."""
    if not bench_multinode.why_not():
        pytest.skip("two hosts with a network of their own have met in the test above")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "SKIP_SETUP": "1", "HEAD": "127.0.0.1", "PORT": str(port), "NODES": "2", "GPUS": "1",
           "SCRIPT": "scripts.preflight", "NANOCHAT_BASE_DIR": str(tmp_path), "PATH": bench_multinode.PATH}  # fmt: skip
    command = ["bash", "runs/multinode.sh", "--largest=4096", "--turns=1", "--device-type=cpu"]
    pipes = {"cwd": bench_multinode.ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    agents = [subprocess.Popen(command, **pipes, text=True)]
    try:
        while not listens(port) and agents[0].poll() is None:
            time.sleep(0.1)
        agents.append(subprocess.Popen(command, **pipes, text=True))
        said = [agent.communicate(timeout=600)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    (line,) = [line for text in said for line in text.splitlines() if line.startswith("{")]
    assert json.loads(line)["world"] == 2 and json.loads(line)["problems"] == []
