"""The doctor sees what is there and what is not, says what to do, and its exit status can be relied on."""

import json

import pytest
import torch
from tiny_model import save_checkpoint

from nanochat import cli
from nanochat.errors import UserError
from scripts import doctor

CPU = torch.device("cpu")


def states(found):
    return {one.name: one.state for one in found}


def test_an_empty_machine_is_ready_but_told_to_train_a_tokenizer(base_dir, capsys, tmp_path):
    out = tmp_path / "d.json"
    doctor.main(doctor.Config(device_type="cpu", speed=False, output=str(out)))
    text = capsys.readouterr().out
    assert "-> python -m scripts.tok_train" in text and text.endswith("Ready.\n")
    assert "sdpa" in text and "flash3 not:" in text  # the backend, and why not the others
    assert {one["name"]: one["state"] for one in json.loads(out.read_text())}["tokenizer"] == doctor.WARN


def test_damage_is_found_and_ends_with_status_1(base_dir, capsys):
    save_checkpoint("sft")
    assert states(doctor.artefacts())["sft d3"] == doctor.GOOD
    (base_dir / "chatsft_checkpoints" / "d3" / "step_000005" / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        cli.run(doctor.main, doctor.Config, ["--device-type=cpu", "--no-speed"])
    assert stop.value.code == 1 and "Not ready: sft d3" in capsys.readouterr().out
    (base_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    assert states(doctor.artefacts())["tokenizer"] == doctor.BAD


def test_missing_packages_and_a_full_disk_are_named(base_dir, monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name == "tiktoken":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    (found,) = doctor.packages()
    assert found.state == doctor.BAD and "tiktoken" in found.text and "uv sync" in found.remedy
    monkeypatch.setattr(doctor.paths, "free_bytes", lambda path: 1e9)
    assert states(doctor.storage())["disk"] == doctor.WARN


def test_a_machine_without_a_cage_is_told_what_it_misses(monkeypatch):
    monkeypatch.setattr(doctor.execution, "_isolation", lambda: ("none", ["no namespaces"]))
    found = doctor.cage()
    assert found.state == doctor.WARN and "no namespaces" in found.text and "bubblewrap" in found.remedy
    monkeypatch.setattr(doctor.execution, "_isolation", lambda: ("bubblewrap", []))
    assert doctor.cage() == doctor.Finding("cage for code", doctor.GOOD, "bubblewrap")


def test_rates_are_set_against_the_data_sheet():
    slow, fine = (doctor.compare("matmul", share * 989e12, 989e12, 1e12, "TFLOP/s") for share in (0.2, 0.7))
    assert (slow.state, fine.state) == (doctor.WARN, doctor.GOOD) and "70 % of 989" in fine.text and slow.remedy
    assert doctor.compare("matmul", 1e12, None, 1e12, "TFLOP/s").state == doctor.GOOD
    assert all("/s" in one.text for one in doctor.speed(CPU))


def test_the_network_is_only_tried_when_asked(base_dir, monkeypatch):
    def refuse(address, timeout):
        raise OSError("no route")

    monkeypatch.setattr(doctor.socket, "create_connection", refuse)
    assert all(one.state == doctor.WARN and "tinyworld" in one.remedy for one in doctor.network())
    assert not any(one.name.startswith("network") for one in doctor.main(
        doctor.Config(device_type="cpu", speed=False))["findings"])  # fmt: skip
    with pytest.raises(UserError, match="unknown"):
        doctor.main(doctor.Config(device_type="abacus"))
