"""The line of a run in a terminal: seen as a terminal would show it, by reading the other end of a pty."""

import io
import logging
import re
import sys
import warnings

import pytest
from terminal import COLUMNS, Terminal
from tqdm import tqdm

from nanochat import live, record


@pytest.fixture
def terminal(monkeypatch):
    """`terminal()`: standard output and error are a terminal from now on (pytest puts its own back after a fixture)."""

    def take_over():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(COLUMNS))
        monkeypatch.setattr(live, "REDRAW", 0.0)
        one = Terminal()
        monkeypatch.setattr(sys, "stdout", one.streams[0])
        monkeypatch.setattr(sys, "stderr", one.streams[1])
        return one

    return take_over


def new_record(tmp_path):
    return record.Record(tmp_path / "record.jsonl", stage="base", config={})


def test_what_is_said_scrolls_above_and_no_line_is_broken(terminal, tmp_path, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr))
    logger = logging.getLogger("of another library")
    logger.addHandler(logging.StreamHandler())  # keeps the standard error of now
    log = new_record(tmp_path)
    said = []
    with log, live.View(log):
        for step in range(20):
            log.step(step, f"step {step}: not for terminals", done=(step + 1) / 20, loss=4.0 - step / 10, seconds=1.5)
            if step % 5 == 2:
                log.say(f"said after step {step}")
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    warnings.warn(f"warned after step {step}", stacklevel=1)
                logger.warning("logged after step %d", step)
                print("printed", end=" ")
                print(f"in parts after step {step}")
                for _ in tqdm(range(3), desc="an evaluation", leave=False, disable=None, mininterval=0):
                    pass
                said += [f"{how} after step {step}" for how in ("said", "warned", "logged", "printed in parts")]
    print("after it")
    shown = terminal.close()
    assert shown[:-3] == said
    last, after, end = shown[-3:]
    assert re.fullmatch(r" 100 % █{30} loss 2.1000 █[▁-█]*▁ \| 1.5 s a step", last), last
    assert (after, end) == ("after it", "")
    assert logger.handlers[0].stream is terminal.streams[1] and sys.stdout is terminal.streams[0]
    assert [row["step"] for row in record.read(log.path) if row["kind"] == "step"] == list(range(20))


def test_what_another_rank_says_in_the_same_terminal_breaks_no_line(terminal, tmp_path, monkeypatch):
    terminal = terminal()
    log, other = new_record(tmp_path), record.Record(tmp_path / "record.jsonl", stage="base", config={}, main=False)
    with log, live.View(log):
        line = sys.stdout
        log.step(0, done=0.5, loss=1.0)
        monkeypatch.setattr(sys, "stdout", terminal.streams[0])  # as in the other rank's process
        with other, live.View(other):
            other.step(0, "a line a step, of rank 0 only", done=0.5, loss=1.0)
            print("a warning of rank 1,", "in parts")
        monkeypatch.setattr(sys, "stdout", line)
        log.step(1, done=1.0, loss=1.0)
    warning, last, end = terminal.close()
    assert warning == "a warning of rank 1, in parts" and last.startswith(" 100 %") and end == ""


def test_an_unfinished_line_of_another_is_left_alone(terminal, tmp_path):
    terminal = terminal()
    log = new_record(tmp_path)
    with log, live.View(log):
        log.step(0, done=0.5, loss=1.0)
        print("loading ...", end="")
        log.step(1, done=0.75, loss=1.0)
        print(" done")
    assert terminal.close()[0] == "loading ... done"


def test_a_run_that_fails_leaves_its_last_line_and_the_streams(terminal, tmp_path):
    terminal = terminal()
    log = new_record(tmp_path)
    with pytest.raises(RuntimeError), log, live.View(log):
        log.step(0, done=0.25, loss=3.0)
        raise RuntimeError("broken")
    assert sys.stdout is terminal.streams[0] and log.view is None
    (line,) = filter(None, terminal.close())
    assert line.startswith("  25 %") and "loss 3.0000" in line


@pytest.mark.parametrize("columns", [20, 50, 80, 200])
def test_the_line_fits_every_width(terminal, tmp_path, monkeypatch, columns):
    terminal = terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    view = live.View(new_record(tmp_path))
    for step in range(100):
        view.show((step + 1) / 101, {"loss": 3.0, "tokens_per_second": 1234567.0})
        assert len(view.line) < columns
    assert ("1,234,567 tok/s" in view.line) == (columns >= 50) and ("█" * 8 in view.line) == (columns >= 80)


@pytest.mark.parametrize(("stream", "term"), [(io.StringIO(), "xterm"), (None, "dumb")])
def test_a_file_a_pipe_or_a_dumb_terminal_gets_plain_lines(terminal, tmp_path, monkeypatch, stream, term):
    terminal = terminal()
    monkeypatch.setenv("TERM", term)
    if stream is not None:
        monkeypatch.setattr(sys, "stdout", stream)
    log = new_record(tmp_path)
    with log, live.View(log):
        for step in range(2):
            log.step(step, f"step {step} | loss 3", done=step / 2, loss=3.0)
    shown = terminal.close()
    assert (shown[:2] if stream is None else stream.getvalue().splitlines()) == ["step 0 | loss 3", "step 1 | loss 3"]
    assert "\x1b" not in (stream.getvalue() if stream else "") and b"\x1b" not in terminal.data


def test_the_sparkline_spans_the_run_and_stays_short():
    history = live.History()
    for i in range(1000):
        history.add(1000.0 - i)
        assert len(history.means) < 2 * live.POINTS
    drawn = history.drawn()
    assert live.POINTS <= len(drawn) and drawn[0] == "█" and drawn[-1] == "▁"
    assert list(drawn) == sorted(drawn, reverse=True)
    flat = live.History()
    flat.add(2.0)
    assert flat.drawn() == "▁" and live.History().drawn() == ""


def test_time_left_is_by_the_pace_after_the_first_step(terminal, tmp_path, monkeypatch):
    terminal = terminal()
    clock = iter([100.0, 110.0, 120.0])  # the first step, which compiles, has ended at 100
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock, 120.0))
    view = live.View(new_record(tmp_path))
    monkeypatch.setattr(view, "draw", lambda: None)
    for done in (0.5, 0.6, 0.7):
        view.show(done, {"reward": 0.25})
    assert view.line.endswith("reward 0.2500 ▁▁▁ | 30 s left"), view.line
    view.show(1.004, {"reward": 0.25})
    assert view.line.startswith(" 100 %") and view.line.endswith("reward 0.2500 ▁▁▁▁")
    assert [live.duration(t) for t in (42, 99.4, 720, 11_100)] == ["42 s", "99 s", "12 min", "3 h 05 min"]
