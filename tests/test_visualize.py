"""The four pictures: every number in their props comes from the model or the record; they can be drawn; types agree."""

import json
import re
import subprocess
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from conftest import lacking
from filelock import FileLock
from PIL import Image, ImageColor

from nanochat import attention, checkpoint, cost, paths, pictures, record
from nanochat.errors import UserError
from scripts import visualize, visualize_data
from tests.tiny_model import TOKENIZER, save_checkpoint, tiny_gpt

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "visualize"
THEME = dict(re.findall(r'const (\w+) = "(#\w{6})"', (PROJECT / "src" / "theme.ts").read_text()))
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


@pytest.mark.slow
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


@pytest.mark.parametrize("wrong", [{"render": "gif"}, {"composition": "Scaling"}, {"browser": "/no/such"},
                                   {"scale": 0.0}, {"frames": -1}, {"scale": 0.3335, "render": "video"}])  # fmt: skip
def test_wrong_wishes_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        visualize.main(visualize.Config(**wrong))


def test_what_is_rendered_is_what_was_asked_for(tmp_path, monkeypatch):
    props, output = tmp_path / "props", tmp_path / "out"
    for name in NAMES:
        paths.write_json(props / f"{name}.json", {})
    asked = []
    monkeypatch.setattr(
        visualize, "run", lambda words, timeout: asked.append((paths.read_json(Path(words[2])), timeout))
    )
    wishes = {"props": str(props), "output": str(output), "timeout": 7.0}
    files = visualize.render(visualize.Config(render="still", frame=9, **wishes), "/b/chromium")
    wishes["composition"] = "TrainingLoss"
    visualize.render(visualize.Config(render="video", frames=10, scale=0.25, **wishes), "/b/chromium")
    (stills, patience), (video, _) = asked
    assert files == [str(output / f"{name}.png") for name in NAMES] == [p["target"] for p in stills["pictures"]]
    assert (stills["kind"], stills["frame"], stills["browser"], stills["patience"]) == ("still", 9, "/b/chromium", 7000)
    assert patience > 4 * 7  # seconds for each of four
    assert video["pictures"] == [{"name": "TrainingLoss", "props": str(props / "TrainingLoss.json"),
                                  "target": str(output / "TrainingLoss.mp4")}]  # fmt: skip
    assert (video["kind"], video["frames"], video["scale"]) == ("video", 10, 0.25)
    assert list(output.iterdir()) == []  # nothing is left of what was needed on the way


@pytest.mark.parametrize("said,error", [("npm error code ENOTFOUND\n...", visualize.CantFetch),
                                        ("npm error code E503\n...", visualize.CantFetch),
                                        ("npm error code ERESOLVE\n...", UserError)])  # fmt: skip
def test_no_way_to_the_registry_is_told_from_a_fault_of_the_project(monkeypatch, said, error):
    monkeypatch.setattr(visualize, "ask", lambda *words: "11.0.0")
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)
    with pytest.raises(UserError, match=re.escape(said[:15])) as raised:
        visualize.install()
    assert type(raised.value) is error


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
    with pytest.raises(UserError, match="`sh -c echo no >&2; exit 3` failed: no"):
        visualize.run(["sh", "-c", "echo no >&2; exit 3"], 600.0)


def test_props_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"lacks TransformerArchitecture.json: .*scripts.visualize_data"):
        visualize.render(visualize.Config(render="still", props=str(tmp_path)), "chromium")


# -- rendered by this machine's Chromium -------------------------------------------------------------------------------


@pytest.fixture
def remotion(chromium):
    """The video project with its packages, for one worker at a time. Where npm can't fetch them: skip, in CI too."""
    if not visualize.ask("npm", "--version"):
        pytest.skip("npm is not here")
    (ROOT / ".pytest_cache").mkdir(exist_ok=True)
    with FileLock(ROOT / ".pytest_cache" / "remotion.lock"):
        if visualize.missing(chromium):
            try:
                visualize.install()
            except visualize.CantFetch as error:
                pytest.skip(str(error))
        assert visualize.missing(chromium) == []
        yield


@pytest.mark.parametrize("promised,outcome", [("", "Skipped"), ("1", "Failed")])
def test_where_browsers_are_promised_their_lack_is_a_failure(monkeypatch, promised, outcome):
    monkeypatch.setenv("NANOCHAT_REQUIRE_BROWSER", promised)
    with pytest.raises(BaseException, match="no Chromium") as raised:
        lacking("no Chromium")
    assert type(raised.value).__name__ == outcome


def pixels(image, color, box=None):
    """Where the picture (or a box of it: left, top, right, bottom) has exactly this colour: a boolean array."""
    part = numpy.asarray(image.crop(box) if box else image)
    return (part == numpy.array(ImageColor.getrgb(color))).all(-1)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 10 s; minutes where the machine is busy or npm is slow
def test_each_still_shows_its_props(written, remotion, tmp_path):
    model, props = written
    files = visualize.main(visualize.Config(render="still", output=str(tmp_path)))["files"]
    assert [Path(file).stem for file in files] == list(NAMES)
    stills = {Path(file).stem: Image.open(file).convert("RGB") for file in files}
    assert {still.size for still in stills.values()} == {visualize.SIZE}
    assert len({still.tobytes() for still in stills.values()}) == len(NAMES)
    for name, color in (("TransformerArchitecture", "VIOLET"), ("TrainingLoss", "BLUE"),
                        ("AttentionVisualization", "AMBER"), ("ScalingLaws", "AMBER")):  # fmt: skip
        assert pixels(stills[name], THEME[color]).sum() > 1000, name
    parameters = props["TransformerArchitecture"]["parameters"]  # each role's bar is as long as its share
    roles = {"embedding": "BLUE", "value_embedding": "TEAL", "matrix": "VIOLET", "head": "AMBER"}
    bars = [pixels(stills["TransformerArchitecture"], THEME[color], (1200, 352 + 112 * i, 1840, 353 + 112 * i)).sum()
            for i, color in enumerate(roles.values())]  # fmt: skip
    most = max(parameters[role] for role in roles)
    assert bars == pytest.approx([450 * parameters[role] / most for role in roles], abs=2)
    maps = sum(len(layer["heads"]) for layer in props["AttentionVisualization"]["layers"])
    assert pixels(stills["AttentionVisualization"], "#fff3d6").sum() > 100 * maps  # the first token reads itself, all


def number(data, name, at, size=4):
    """A big-endian number of an MP4's box: `at` bytes behind the box's name."""
    start = data.index(name) + 4 + at
    return int.from_bytes(data[start : start + size], "big")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 10 s; minutes where the machine is busy or npm is slow
def test_a_video_has_the_frames_and_the_size_that_were_asked_for(written, remotion, tmp_path):
    cfg = visualize.Config(render="video", composition="TrainingLoss", frames=10, scale=0.25, output=str(tmp_path))
    (file,) = visualize.main(cfg)["files"]
    data = Path(file).read_bytes()
    assert data[4:8] == b"ftyp" and len(data) > 2000
    assert number(data, b"mvhd", 16) / number(data, b"mvhd", 12) == pytest.approx(
        10 / 30, abs=0.04
    )  # s, at 30 a second
    assert number(data, b"stsz", 8) == 10  # samples of the track
    assert (number(data, b"tkhd", 76, 2), number(data, b"tkhd", 80, 2)) == (480, 270)


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
