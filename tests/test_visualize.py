"""The four pictures: every number in their props comes from the model or the record; they can be drawn; types agree."""

import json
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from nanochat import attention, checkpoint, cost, paths, pictures, record
from nanochat.errors import UserError
from scripts import visualize, visualize_data
from tests.tiny_model import TOKENIZER, save_checkpoint, tiny_gpt

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "visualize"
NAMES = ("TransformerArchitecture", "TrainingLoss", "AttentionVisualization", "ScalingLaws")


def write_run(tag, flops, bpb, depth=3, steps=30):
    """A base record of a finished run."""
    rows = record.Record(
        checkpoint.folder("base") / tag / "record.jsonl", stage="base", config={"dataset": "tinyworld"}
    )
    rows.event("plan", plan={"config": {"n_layer": depth, "vocab_size": 265}, "parameters": {"total": 1000 * depth},
                             "tokens": 10**6, "flops": flops})  # fmt: skip
    for step in range(steps):
        rows.step(step, loss=5.0 / (step + 1), smooth_loss=6.0 / (step + 1), lr=1 - step / steps)
    rows.eval(steps, val_bpb=bpb)
    rows.close(seconds=60.0)


@pytest.fixture
def written(base_dir):
    model = save_checkpoint("base")
    for i, tag in enumerate(("d3", "s_a", "s_b", "s_c")):
        write_run(tag, 10.0 ** (12 + i), 2.0 * 0.8**i)
    result = visualize_data.main(visualize_data.Config(model_tag="d3", prompt="the cat sat"))
    return model, {name: paths.read_json(Path(result["folder"]) / f"{name}.json") for name in NAMES}


def test_the_architecture_is_the_models(written):
    model, props = written
    shown = props["TransformerArchitecture"]
    assert shown["parameters"] == cost.parameters(model.config)
    assert [layer["window"] for layer in shown["layers"]] == model.windows()
    assert [layer["resid"] for layer in shown["layers"]] == pytest.approx(model.resid_lambdas.tolist(), abs=1e-4)
    assert shown["smear"] == pytest.approx(float(model.smear_lambda.detach()), abs=1e-4)


def test_attention_is_computed_and_not_invented():
    model, ids = tiny_gpt(), TOKENIZER.encode("the cat sat on the mat")
    before = model(torch.tensor([ids]))
    maps = visualize_data.attention_maps(model, ids)
    assert torch.equal(model(torch.tensor([ids])), before)  # looking changes nothing
    assert len(maps) == model.config.n_layer and maps[0].shape == (model.config.n_head, len(ids), len(ids))
    for window, layer in zip(model.windows(), maps):
        assert torch.allclose(layer.sum(-1), torch.ones(()))
        assert torch.equal(layer > 0, attention.visible(len(ids), len(ids), window).expand_as(layer))
    # what the map says is what the layer does: weights times values is the reference's answer
    q, k, v = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    mixed = torch.einsum("bhqk,bkhd->bqhd", attention.weights(q, k, 5), v.repeat_interleave(2, dim=2))
    assert torch.allclose(mixed, attention.load("sdpa").attend(q, k, v, 5), atol=1e-5)


def test_another_prompt_and_another_model_give_other_maps(written):
    _, props = written
    shown = props["AttentionVisualization"]
    assert shown["tokens"] == ["bos", *"the cat sat"]
    model = tiny_gpt(seed=1)
    other = visualize_data.attention_props(model, TOKENIZER, "the cat sat", "x")
    assert other["tokens"] == shown["tokens"] and other["layers"] != shown["layers"]
    with pytest.raises(UserError, match="--prompt is empty"):
        visualize_data.attention_props(model, TOKENIZER, "", "x")


def test_curves_are_the_records(written):
    _, props = written
    (stage,) = props["TrainingLoss"]["stages"]
    assert stage["raw"]["y"] == pytest.approx([5.0 / (i + 1) for i in range(30)], abs=1e-5)
    assert stage["val_bpb"] == {"x": [30], "y": [2.0]} and stage["minutes"] == 1.0
    long = visualize_data.thin(list(range(1000)), [float(i) for i in range(1000)])
    assert len(long["x"]) == visualize_data.POINTS and (long["x"][0], long["x"][-1]) == (0, 999)


def test_the_law_is_fitted_to_the_frontier_with_its_residuals(written):
    _, props = written
    shown = props["ScalingLaws"]
    assert [run["tag"] for run in shown["runs"]] == ["d3", "s_a", "s_b", "s_c"] == shown["best"]
    law = shown["law"]  # bpb falls by 0.8 for each tenfold compute
    assert law["a"] * 1e14 ** law["b"] == pytest.approx(2 * 0.8**2, rel=1e-6)
    assert max(map(abs, law["residuals"])) < 1e-4
    runs = [{"tag": t, "flops": f, "bpb": b} for t, f, b in (("a", 100, 3), ("b", 105, 2), ("c", 1000, 1))]
    assert [run["tag"] for run in visualize_data.best_at_each_budget(runs)] == ["b", "c"]
    assert visualize_data.fit([(1.0, 2.0), (2.0, 1.0)]) is None
    bent = visualize_data.fit([(1.0, 4.0), (10.0, 2.0), (100.0, 2.0)])
    assert sum(bent["residuals"]) == pytest.approx(0, abs=1e-4) and max(bent["residuals"]) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_picture_can_be_drawn(written, name, tmp_path):
    pictures.draw(name, written[1][name], tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert data[:4] == b"\x89PNG" and (width, height) == (1600, 900)


def test_few_runs_and_deep_models_can_be_drawn_too(tmp_path, base_dir):
    pictures.draw("ScalingLaws", visualize_data.scaling_props({}, 512), tmp_path / "a.png")
    deep = visualize_data.architecture(tiny_gpt(n_layer=20, window_pattern="SSSL"), "deep")
    pictures.draw("TransformerArchitecture", deep, tmp_path / "b.png")
    with pytest.raises(UserError, match="no picture"):
        pictures.draw("Mona Lisa", {}, tmp_path / "c.png")


# -- rendering ---------------------------------------------------------------------------------------------------------


def test_setup_says_what_is_missing_and_what_to_do(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(visualize, "installed", dict)
    said = " ".join(visualize.main(visualize.Config())["problems"])
    assert (
        "nodejs.org" in said and "--install" in said and "remotion 4.0.529" in said and "apt install chromium" in said
    )
    with pytest.raises(UserError, match="(?s)Nothing can be rendered yet.*nodejs.org"):
        visualize.main(visualize.Config(render="still"))
    with pytest.raises(UserError, match="npm is not here"):
        visualize.main(visualize.Config(install=True))


@pytest.mark.parametrize("wrong", [{"render": "gif"}, {"composition": "Scaling"}, {"browser": "/no/such"}])
def test_wrong_wishes_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        visualize.main(visualize.Config(**wrong))


def test_the_command_is_the_one_remotion_documents(tmp_path):
    cfg = visualize.Config(render="still", frame=7)
    words = visualize.command(cfg, "TrainingLoss", tmp_path, tmp_path / "p.json", tmp_path / "o.png", "/b/chromium")
    assert words[3:7] == ["still", str(tmp_path), "TrainingLoss", str(tmp_path / "o.png")]
    assert {
        f"--props={tmp_path / 'p.json'}",
        "--browser-executable=/b/chromium",
        "--frame=7",
        "--timeout=600000",
    } <= set(words)
    video = visualize.command(visualize.Config(render="video"), "TrainingLoss", tmp_path, tmp_path, tmp_path, "b")
    assert video[3] == "render" and not any(word.startswith("--frame") for word in video)


def test_a_program_that_does_not_answer_is_a_sentence(monkeypatch):
    monkeypatch.setattr(visualize, "PATIENCE", 0.01)
    with pytest.raises(UserError, match="`sleep 9` has not answered for 0.01 s: run this again"):
        visualize.ask("sleep", "9")


def test_what_takes_too_long_is_ended_with_all_it_has_started(tmp_path, monkeypatch):
    file, real = tmp_path / "pid", subprocess.Popen.communicate

    def communicate(process, timeout=None):
        if timeout is None:
            return real(process)
        while not (file.exists() and file.read_text().endswith("\n")):
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(UserError, match="took more than 5 s: raise --timeout"):
        visualize.run(["sh", "-c", f"sleep 600 & echo $! > {file}; wait"], 5.0)
    monkeypatch.undo()
    started = int(file.read_text())
    while psutil.pid_exists(started) and psutil.Process(started).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)  # for ever, if it goes on: the suite's time limit
    with pytest.raises(UserError, match="`sh -c echo no; exit 3` failed: no"):
        visualize.run(["sh", "-c", "echo no; exit 3"], 600.0)


def test_props_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"lacks TransformerArchitecture.json: .*scripts.visualize_data"):
        visualize.render(visualize.Config(render="still", props=str(tmp_path)), "chromium")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a bundle and a browser: 20 s, minutes where the machine is busy
def test_a_still_is_rendered_by_chromium(written, tmp_path):
    problems = visualize.missing(visualize.find_browser(""))
    if problems:
        pytest.skip(problems[0])
    folder = checkpoint.folder("base").parent / "visualize"
    cfg = visualize.Config(render="still", props=str(folder), output=str(tmp_path), composition="ScalingLaws")
    (file,) = visualize.main(cfg)["files"]
    data = Path(file).read_bytes()
    assert [int.from_bytes(data[i : i + 4], "big") for i in (16, 20)] == [1920, 1080]
    assert len(set(data)) > 200 and len(data) > 50_000  # something was drawn


# -- the Remotion project ----------------------------------------------------------------------------------------------


def test_versions_are_pinned_and_every_remotion_package_has_one():
    package = json.loads((PROJECT / "package.json").read_text())
    wanted = package["dependencies"] | package["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values()), wanted
    assert {v for name, v in wanted.items() if "remotion" in name} == {"4.0.529"}
    assert "package-lock.json" in (ROOT / ".gitignore").read_text()  # it names the host it was made with


def test_the_project_declares_the_four_compositions():
    root = (PROJECT / "src" / "Root.tsx").read_text()
    assert set(re.findall(r'id="(\w+)"', root)) == set(NAMES) == set(pictures.PICTURES)
    assert "registerRoot" in (PROJECT / "src" / "index.ts").read_text()


def fields(typescript, name):
    """{field: its type} of an exported TypeScript type, written one field a line."""
    body = re.search(rf"export type {name} = {{(.*?)\n}};", typescript, re.DOTALL)[1]
    return dict(re.findall(r"^  (\w+): ([^;]+);", body, re.MULTILINE))


def agree(value, kind, typescript, path):
    """Assert that a JSON value is of this TypeScript type."""
    if kind.endswith(" | null"):
        if value is None:
            return
        kind = kind.removesuffix(" | null")
    if kind.endswith("[]"):
        assert isinstance(value, list), path
        for item in value:
            agree(item, kind[:-2], typescript, path)
    elif kind.startswith("Record<"):
        assert isinstance(value, dict) and all(isinstance(item, int | float) for item in value.values()), path
    elif kind in ("number", "string", "boolean"):
        assert isinstance(value, {"number": int | float, "string": str, "boolean": bool}[kind]), (path, value)
    else:
        wanted = fields(typescript, kind)
        assert set(value) == set(wanted), (path, set(value) ^ set(wanted))
        for name, inner in wanted.items():
            agree(value[name], inner, typescript, f"{path}.{name}")


def test_the_props_files_have_the_types_of_the_compositions(written):
    typescript = (PROJECT / "src" / "props.ts").read_text()
    for name, value in written[1].items():
        agree(value, f"{name}Props", typescript, name)
    with pytest.raises(AssertionError):
        agree({**written[1]["ScalingLaws"], "extra": 1}, "ScalingLawsProps", typescript, "")
