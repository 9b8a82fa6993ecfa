"""The report: curves stand where they were measured, runs are compared, laws fitted; the page needs nothing else."""

import math

import pytest

from nanochat import plots, record, report
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
    assert "GPT-2 XL, mean 0.2565" in page and "&lt;b&gt;half" in page and "<b>half" not in page
    assert "<script" not in page and "src=" not in page and 'href="http' not in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids)), "pictures share ids: a clip path of one would hide another"
    text = (base_dir / "out" / "report.md").read_text()
    assert "| base val_bpb | 1.0000 | 0.5000 |" in text and "half</b> \\| done" in text
    assert "| base | 10 | A dog |" in text and "| base | 20 | A dog | barks |" in text  # samples over time
    with pytest.raises(UserError, match="scripts.series"):
        script.main(script.Config(model_tag="one", series="nothing.csv"))


def test_a_power_law_is_found_and_what_is_off_it_shows():
    x = [1e3, 1e4, 1e5, 1e6]
    found = plots.fit(x, [7.0 * v**-0.3 for v in x])
    assert found.b == pytest.approx(-0.3) and found.a == pytest.approx(7.0)
    assert max(map(abs, found.residuals)) < 1e-9
    off = plots.fit(x, [7.0 * v**-0.3 * (1.1 if v == 1e4 else 1) for v in x])
    assert max(off.residuals) == off.residuals[1] > 0.05
    with pytest.raises(ValueError, match="two sizes"):
        plots.fit([2.0, 2.0], [1.0, 3.0])


def test_long_curves_are_thinned_but_keep_their_ends():
    x, y = plots.thin(list(range(100_000)), [math.sin(v) for v in range(100_000)])
    assert len(x) <= plots.MOST_POINTS + 1 and (x[0], x[-1]) == (0, 99_999) and len(x) == len(y)


@pytest.mark.slow  # a browser
def test_the_page_opens_in_a_browser_without_a_word_and_every_picture_is_seen(base_dir):
    import shutil

    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium here")
    write(base_dir)
    script.main(script.Config(model_tag="one", output=str(base_dir / "out")))
    said = []
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto((base_dir / "out" / "report.html").as_uri())
        boxes = page.eval_on_selector_all("svg", "all => all.map(one => one.getBoundingClientRect().height)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert said == [] and len(boxes) >= 12 and min(boxes) > 100 and wide <= 390
