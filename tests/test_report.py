"""The report: curves stand where they were measured, runs are compared, laws fitted; the page needs nothing else."""

import io
import json
import math
import os
import re
import xml.etree.ElementTree

import pytest
from PIL import Image, ImageStat

from nanochat import plots, record, report, report_page
from nanochat.errors import UserError
from scripts import report as script


def write(base_dir, tag="one", stage="base", folder="base_checkpoints", steps=20, core=True, speed=1.0):
    log = record.Record(base_dir / folder / tag / "record.jsonl", stage=stage, config={"model_tag": tag})
    config = {"n_layer": 2, "n_embd": 32}
    log.event("plan", plan={"config": config, "batch": 100, "flops_per_token": 6.0, "iterations": steps})
    log.eval(0, val_bpb=3.0)
    for step in range(steps):
        loss = 5 / (step + 1) ** 0.5
        log.step(step, loss=loss, smooth_loss=loss, lr=1.0, grad_norm=0.5, seconds=6.0 / speed, memory=2**30,
                 tokens_per_second=100.0, tokens=100 * (step + 1))  # fmt: skip
    log.event("sample", step=steps // 2, prompt="A dog", text="is <b>half</b> | done")
    log.event("sample", step=steps, prompt="A dog", text="barks")
    tasks = {name: {"centered": 0.1 * i} for i, name in enumerate(("copa", "piqa", "squad"))} if core else {}
    log.eval(steps, val_bpb=1.0 / speed, core=0.2, core_tasks=tasks)
    log.close(seconds=6.0 * steps / speed, peak_bytes=2**31)


def test_an_evaluation_stands_at_the_tokens_flops_and_minutes_that_were_spent(base_dir):
    write(base_dir)
    rows = report.collect(base_dir, "one")["base"]
    bpb = {axis: report.curve("", rows, "val_bpb", "eval", axis).x for axis in ("step", "tokens", "flops", "minutes")}
    assert bpb["step"] == [0, 20] and bpb["tokens"] == [0.0, 2000] and bpb["flops"] == [0.0, 12000.0]
    assert bpb["minutes"] == [0.0, pytest.approx(2.0)]
    assert report.curve("", rows, "loss", axis="tokens").x == [100 * (step + 1) for step in range(20)]


@pytest.mark.slow
def test_the_page_has_every_picture_escapes_what_models_write_and_needs_nothing_else(base_dir):
    write(base_dir)
    write(base_dir, "two", speed=2.0)
    series = [{"depth": str(d), "flops": f"1e{12 + d}", "val_bpb": str(2 / d), "tokens": str(10**d)} for d in (1, 2, 3)]
    (base_dir / "s.csv").write_text(
        "depth,flops,val_bpb,tokens\n" + "".join(",".join(row.values()) + "\n" for row in series)
    )
    script.main(script.Config(model_tag="one,two", series=str(base_dir / "s.csv"), output=str(base_dir / "out")))
    page = (base_dir / "out" / "report.html").read_text()
    for title in ("base: training loss over FLOPs", "base: validation over minutes", "base: gradient norm",
                  "base: memory in use", "base: throughput", "CORE by task", "bits per byte over compute"):  # fmt: skip
        assert title in page, title
    assert "GPT-2 XL (published nanochat, dev/estimate_gpt3_core.ipynb)" in page and "0.2565" in page
    assert "&lt;b&gt;half" in page and "<b>half" not in page
    assert "<script" not in page and "src=" not in page and 'href="http' not in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids)), "pictures share ids: a clip path of one would hide another"
    text = (base_dir / "out" / "report.md").read_text()
    assert "| base val_bpb | 1.0000 | 0.5000 |" in text and "half</b> \\| done" in text
    assert "| base | 10 | A dog |" in text and "| base | 20 | A dog | barks |" in text  # samples over time
    shown = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert len(shown) == page.count("<svg ") >= 14 and "report_pictures/core_by_task_centred_on_chance.svg" in shown
    for name in shown:  # each a picture by itself, as Markdown shows it
        assert xml.etree.ElementTree.parse(base_dir / "out" / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for wrong, said in (("nothing.csv", "can't be read"), (str(base_dir / "out" / "report.md"), "no rows with flops")):
        with pytest.raises(UserError, match=said):
            script.main(script.Config(model_tag="one", series=wrong))


def test_gpt2_stands_beside_the_run_by_task_where_it_is_known(base_dir):
    write(base_dir)
    runs = {"one": report.collect(base_dir, "one")}
    table = report.core_table(runs, report.GPT2)
    assert [row[0] for row in table] == ["task", "copa", "piqa", "squad"]
    assert table[2] == ["piqa", "0.1000", "0.4500"] and table[1][2] == "–"  # published for piqa: 72.5 % of two choices
    assert report.GPT2.core == 0.256525 and len(report.GPT2.tasks) == 6
    (base_dir / "eval_bundle").mkdir()
    (base_dir / "eval_bundle" / "core.yaml").write_text("icl_tasks: []\n")
    assert script.gpt2() == report.GPT2  # a bundle without the table
    csv = "Task , Accuracy , Centered\ncopa , 0.64 , 0.28\nsquad , 0.37 , 0.37\nCORE , , 0.256525\n"
    (base_dir / "eval_bundle" / report.GPT2_TABLE).write_text(csv)
    assert script.gpt2()[1:] == ({"copa": 0.28, "squad": 0.37}, 0.256525)
    assert report.reference("nothing of the kind") == report.GPT2
    assert [row[2] for row in report.core_table(runs, script.gpt2())[1:]] == ["0.2800", "–", "0.3700"]


@pytest.mark.slow
def test_scores_say_where_they_come_from_and_how_sure_they_are(base_dir):
    write(base_dir, core=False)
    log = record.Record(base_dir / "chatrl_checkpoints" / "one" / "record.jsonl", stage="rl", config={})
    log.eval(0, **{"pass@1": 0.8, "pass@1_se": 0.02})
    for step in range(3):
        log.step(step, reward=0.5)
    log.eval(3, **{"pass@1": 0.9, "pass@1_se": 0.01}, facts=1.0)
    log.eval(3, facts=0.5, facts_stderr=0.25)
    run = report.collect(base_dir, "one")
    table = {row[0]: row[1:] for row in report.score_table(run)}
    assert table["pass@1"] == ["–", "0.8000 ± 0.0200 → 0.9000 ± 0.0100"] and table["facts"] == ["–", "0.5000 ± 0.2500"]
    assert table["val_bpb"] == ["3.0000 → 1.0000", "–"] and not [name for name in table if name.endswith(report.ERRORS)]
    rows = [row[0] for row in report.compared({"one": run})]
    assert rows == ["", "base core", "base minutes", "base val_bpb", "rl facts", "rl minutes", "rl pass@1"]
    assert report.compared({"one": run})[-1] == ["rl pass@1", "0.9000 ± 0.0100"]
    drawn = [picture.title for _, pictures in report.figures({"one": run}) for picture in pictures]
    assert "rl: pass@1" in drawn and not [title for title in drawn if title.endswith(report.ERRORS)]


def test_numbers_of_the_plan_are_short_and_no_sample_stands_twice():
    time = {"time": 1.0}
    plan = {"plan": {"flops": 46066591334400.0, "lrs": {"matrix": 0.01866065983073615}, "notes": [], "batch": 4096}}
    twice = [{"kind": "sample", "step": 5, "prompt": "A dog", "text": text, **time} for text in ("a", "b", "a")]
    run = {"base": [{"kind": "plan", **plan, **time}, *twice]}
    assert report.plan_lines(run)[1:] == [["flops", "4.60666e+13"], ["lrs matrix", "0.0186607"], ["batch", "4,096"]]
    assert [row[3] for row in report.samples(run)[1:]] == ["a", "b"]


def test_a_run_killed_before_its_first_step_is_a_page_that_says_so(base_dir):
    write(base_dir, steps=0, core=False)
    path = base_dir / "base_checkpoints" / "one" / "record.jsonl"
    begun = path.read_text().splitlines()[:2]  # start and plan
    path.write_text("\n".join(begun) + "\n")
    script.main(script.Config(output=str(base_dir / "out")))
    text = (base_dir / "out" / "report.md").read_text()
    assert "# Report of one" in text and "| base | 0.0 | 0 | – | no end in its record" in text and "![" not in text
    path.write_text(begun[0] + "\n")
    assert report.ending(report.collect(base_dir)["base"]) == "never began"
    path.write_text(begun[0][:20])  # torn in its first row
    with pytest.raises(UserError, match="The records of one in .* hold no row that can be read"):
        script.main(script.Config())


def test_a_run_without_evaluations_and_one_that_failed_are_pages(base_dir):
    write(base_dir)
    path = base_dir / "base_checkpoints" / "one" / "record.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bare = [row for row in rows if row["kind"] not in ("eval", "sample", "summary", "plan")]
    failed = {"kind": "failed", "time": rows[-1]["time"], "error": "UserError", "message": "the disk | is full\nso"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*bare, failed]))
    script.main(script.Config(output=str(base_dir / "out")))
    text = (base_dir / "out" / "report.md").read_text()
    assert "failed: the disk \\| is full |" in text and "## Scores" not in text
    assert "base_training_loss_over_minutes.svg" in text and "over_flops" not in text  # no plan: no FLOPs


def strange(rows):
    """Records as other versions, or damage, might leave them, made from sound rows."""
    odd = [{"kind": "step", "time": 1.0}, {"kind": "eval", "step": None, "time": 1.0}, {"kind": "plan", "time": 1.0},
           {"kind": "sample", "step": 3, "time": 1.0}, {"kind": "news", "time": 1.0, "step": "seven"},
           {"kind": "step", "step": 4, "loss": 1.0}, {"kind": "eval", "time": 1.0, "step": 2, "core_tasks": ["a"]},
           {"kind": "step", "step": 5, "time": 1.0, "loss": "low", "seconds": "long", "tokens": {}, "memory": None},
           {"kind": "plan", "time": 1.0, "plan": {"batch": None, "flops_per_token": "many"}},
           {"kind": "failed", "time": 2.0},
           {"kind": "summary", "time": 2.0, "seconds": None, "peak_bytes": "x"}]  # fmt: skip
    yield [*rows, *odd]
    yield [*odd, *rows]
    yield odd
    for row in odd:
        yield [row, *rows, row]
    for gone in sorted({key for row in rows for key in row} - {"kind"}):
        yield [{key: value for key, value in row.items() if key != gone} for row in rows]
        yield [{key: (None if key == gone else value) for key, value in row.items()} for row in rows]
        yield [{key: ([1] if key == gone else value) for key, value in row.items()} for row in rows]


@pytest.mark.slow
def test_records_of_other_versions_or_damaged_ones_are_a_page_or_a_sentence(base_dir, monkeypatch):
    for name in ("lines", "radar"):  # drawing is tested above, and slow
        monkeypatch.setattr(plots, name, lambda *given, **how: plots.Picture("a title", "<svg/>"))
    write(base_dir, steps=4)
    path = base_dir / "base_checkpoints" / "one" / "record.jsonl"
    sound = [json.loads(line) for line in path.read_text().splitlines()]
    for rows in strange(sound):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text + text.splitlines()[-1][:25])  # and the last row torn
        try:
            made = report.make({"one": report.collect(base_dir, "one")}, {})
            assert made.tables and report_page.page(made) and report_page.markdown(made)
        except UserError as error:
            assert "no row that can be read" in str(error)


def test_without_a_tag_it_is_the_run_that_was_written_last(base_dir):
    for i, tag in enumerate(("old", "new", "middle")):
        write(base_dir, tag, steps=2, core=False)
        os.utime(base_dir / "base_checkpoints" / tag / "record.jsonl", (100 + i % 2, 100 + i % 2))
    assert report.newest(base_dir) == "new" and list(script.gather("")) == ["new"]
    assert list(script.gather("old, middle,")) == ["old", "middle"]
    with pytest.raises(UserError, match="No record of a run named none in"):
        script.gather("none")


def test_a_law_leaves_out_what_is_no_number():
    rows = [{"depth": "1", "flops": "1e12", "val_bpb": "2"}, {"depth": "2", "flops": "1e13", "val_bpb": "1"},
            {"flops": "much", "val_bpb": "1"}, {"flops": "inf", "val_bpb": "1", "tokens": ""}]  # fmt: skip
    (picture,) = report.law_pictures(rows)
    assert picture.title == "bits per byte over compute" and "d1" in picture.svg and "d2" in picture.svg


@pytest.mark.slow
def test_the_axis_of_a_law_names_values_that_do_not_lie_over_each_other():
    def names(y):
        svg = plots.law([(str(v), v, v) for v in y], "t", "FLOPs", "tokens").svg
        return set(
            re.findall(r">([^<>\n]+)</text>", svg[svg.index("matplotlib.axis_2") : svg.index("matplotlib.axis_3")])
        )

    assert {"2 M", "5 M", "10 M"} <= names([1.2e6, 5e6, 1.9e7]) and not {"7 M", "8 M"} & names([1.2e6, 5e6, 1.9e7])
    assert {"0.8", "0.9"} <= names([0.76, 0.9, 1.2])


def test_a_power_law_is_found_and_what_is_off_it_shows():
    x = [1e3, 1e4, 1e5, 1e6]
    found = plots.fit(x, [7.0 * v**-0.3 for v in x])
    assert found.b == pytest.approx(-0.3) and found.a == pytest.approx(7.0)
    assert max(map(abs, found.residuals)) < 1e-9
    off = plots.fit(x, [7.0 * v**-0.3 * (1.1 if v == 1e4 else 1) for v in x])
    assert max(off.residuals) == off.residuals[1] > 0.05
    with pytest.raises(ValueError, match="two sizes"):
        plots.fit([2.0, 2.0], [1.0, 3.0])


def test_a_steep_start_is_cut_off_and_said_and_noise_has_its_median():
    steps = list(range(200))
    falling = plots.Curve("a", steps, [8.0 / (1 + step) + 1 for step in steps])
    low, high = plots.window([falling])
    assert low < 1.04 and 1.7 < high < 2  # 8 / 11 + 1 after a twentieth
    assert plots.window([plots.Curve("b", steps, [float(step) for step in steps])]) is None
    svg = plots.lines([falling], "t", "step", "nats").svg
    assert "starts at 9" in plots.lines([falling], "t", "step", "nats", falling=True).svg and "starts at" not in svg
    assert plots.middle([1.0, 1.0, 9.0, 1.0, 1.0]) == [1.0] * 5
    curves = lambda svg: svg.count("line2d")
    assert curves(plots.lines([falling], "t", "step", "", noisy=True).svg) == curves(svg) + 1


def test_axes_write_their_numbers_as_people_do():
    svg = plots.lines([plots.Curve("", [0, 4e6], [0, 4e4])], "t", "tokens", "tokens/s").svg
    assert ">2 M<" in svg and ">20 k<" in svg and "1e6" not in svg
    svg = plots.lines([plots.Curve("", [0, 4e13], [0, 1])], "t", "FLOPs", "").svg
    assert ">2e13<" in svg and ">1e13<" in svg


def test_long_curves_are_thinned_but_keep_their_ends():
    x, y = plots.thin(list(range(100_000)), [math.sin(v) for v in range(100_000)])
    assert len(x) <= plots.MOST_POINTS + 1 and (x[0], x[-1]) == (0, 99_999) and len(x) == len(y)


BROKEN = """all => all.flatMap(cell => {
    const text = cell.firstChild, found = [];
    if (!text || text.nodeType !== Node.TEXT_NODE) return found;
    for (const word of text.data.matchAll(/\\S+/g)) {
        const range = document.createRange();
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) found.push(word[0]);
    }
    return found;
})"""


@pytest.mark.slow  # a browser
@pytest.mark.parametrize("scheme,width", [("light", 1280), ("dark", 390)])
def test_the_page_opens_in_a_browser_without_a_word_and_every_picture_is_seen(base_dir, browser, scheme, width):
    write(base_dir)
    log = record.Record(base_dir / "chatrl_checkpoints" / "one" / "record.jsonl", stage="rl", config={})
    log.eval(0, **{"pass@1": 0.8, "pass@1_se": 0.02}, facts=0.75)
    log.step(0, reward=0.5)
    log.eval(1, **{"pass@1": 0.9, "pass@1_se": 0.01}, facts=0.8)
    script.main(script.Config(model_tag="one", output=str(base_dir / "out")))
    said = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
    page.goto((base_dir / "out" / "report.html").as_uri())
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    boxes = page.eval_on_selector_all("svg", "all => all.map(one => one.getBoundingClientRect().height)")
    wide = page.evaluate("document.documentElement.scrollWidth")
    broken = page.eval_on_selector_all("td, th", BROKEN)
    with Image.open(io.BytesIO(page.locator("svg").first.screenshot())) as picture:
        (light,) = ImageStat.Stat(picture.convert("L")).mean
    page.close()
    assert said == [] and len(boxes) >= 12 and min(boxes) > 100 and wide <= width
    assert broken == [] and (light > 200) == (scheme == "light") and 20 < light < 252  # drawn on the page's own ground
