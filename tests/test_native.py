"""Steps in C (native.py, kernels/cpu_forward) against GPT.forward; how it is compiled, and without it."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import both
from tiny_model import TOKENIZER, tiny_gpt

from nanochat import native
from nanochat.engine import Engine
from nanochat.kernels import compiled, cpu_forward, cpu_train
from nanochat.kernels.compiled import Unavailable
from nanochat.sampling import Sampling, sample

ROOT = Path(__file__).resolve().parents[1]
GREEDY = Sampling(temperature=0, max_tokens=5, stop_tokens=())


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """As a process that has not yet asked for the library, with a cache of its own. Compiled quickly, not well."""
    monkeypatch.setenv("NANOCHAT_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-O0"))
    cpu_forward.library.cache_clear()
    yield tmp_path / "kernels"
    cpu_forward.library.cache_clear()


def script(path, text):
    """A program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# -- right ------------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """A shape, rows of any lengths, the tokens that all begin with, tokens a block, threads, how C reads (0: torch)."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    window = st.one_of(st.just("L"), st.integers(1, 40).map(str))
    shape = {
        "n_layer": layers, "n_kv_head": kv_heads, "n_head": heads,
        "n_embd": heads * 2 * draw(st.integers(1, 7)), "vocab_size": draw(st.integers(265, 330)),
        "window_pattern": ",".join(draw(st.lists(window, min_size=2, max_size=3))),
    }  # fmt: skip
    size, shared = draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([0, 0, 16, 32]))
    lengths = draw(st.lists(st.integers(shared, 58), min_size=1, max_size=20))
    return shape, lengths, shared, size, draw(st.integers(1, 3)), draw(st.sampled_from([0, 7, 50]))


def check(case):
    """The C's logits are those of GPT.forward."""
    shape, lengths, shared, size, threads, parts = case
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast, slow = both(tiny_gpt(1, **shape), lengths, steps=2, way="native", shared=shared, size=size, parts=parts)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


@given(cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_c_equals_the_whole_forward(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma")], ids=str)
def test_other_vectors_compute_the_same(flags, tmp_path, monkeypatch):
    if flags and "avx2" not in compiled.processor():
        pytest.skip("this processor has no AVX2")
    path = tmp_path / "other.so"
    assert compiled.build(compiled.find_compiler(), (*compiled.FLAGS, *flags), cpu_forward.SOURCE, path) == ""
    library = cpu_forward.load(path)
    assert library.panel_columns() == (16 if flags else 8)
    monkeypatch.setattr(cpu_forward, "library", lambda: library)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13):
        check(({"n_embd": 40}, [11] * rows, 0, 4, 2, rows))
    check_int8()


@pytest.mark.parametrize("parts", [0, pytest.param(170, marks=pytest.mark.slow)])
def test_long_rows_and_a_wide_model(parts):
    model = tiny_gpt(3, sequence_len=300, n_embd=192, n_head=3, n_kv_head=3, window_pattern="100,L")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(0.4)  # logits of a usual size: in fp32 rounding grows with them
    fast, slow = both(model, [280, 129, 16, 250, 3, 0, 77, 200, 90], way="native", size=16, parts=parts)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def test_nan_is_not_hidden_and_stays_in_its_row():
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, guesses=0)
    with torch.no_grad():
        model.transformer.wte.weight[7] = float("nan")
    sequences = [engine.submit(ids, GREEDY)[0] for ids in ([1, 2, 7, 3], [1, 2, 4, 3])]
    engine.step()
    seen = []
    decode = engine.decoder
    engine.decoder = lambda batch: seen.append(decode(batch)) or seen[-1]
    engine.step()
    assert len(sequences) == 2 and seen[0][0].isnan().all() and seen[0][1].isfinite().all()


def check_int8():
    """The C's logits with 8-bit weights are torch's with the same rounded weights."""
    lengths = [20, 3, 30, 9, 1]  # more rows than INT8_ROWS: torch computes in fp32 with rounded weights
    fast, _ = both(tiny_gpt(n_embd=64), lengths, int8=True, way="native")
    slow, _ = both(tiny_gpt(n_embd=64), lengths, int8=True)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)
    lengths = [20, 33, 47, 13, 12]  # parts of 7 that leave more than INT8_ROWS too
    fast, _ = both(tiny_gpt(n_embd=64), lengths, int8=True, way="native", parts=50)
    slow, _ = both(tiny_gpt(n_embd=64), lengths, int8=True, way="rows")
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=0)


def test_int8_equals_torch_with_the_same_rounded_weights():
    check_int8()


def test_only_what_c_can_compute_is_given_to_it():
    engines = [Engine(tiny_gpt(), TOKENIZER), Engine(tiny_gpt().double(), TOKENIZER)]
    engines += [Engine(tiny_gpt().bfloat16(), TOKENIZER), Engine(tiny_gpt(), TOKENIZER, static=True)]
    assert [isinstance(engine.decoder, native.Native) for engine in engines] == [True, False, False, False]


# -- threads ----------------------------------------------------------------------------------------------------------


def test_threads_sleep_between_two_steps():
    torch.set_num_threads(2)
    try:
        both(tiny_gpt(), [5, 9, 30], way="native")
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1
    finally:
        torch.set_num_threads(1)


FORKED = """
import os, sys
sys.path.insert(0, "tests")
import torch
from test_native import check
torch.get_num_threads = lambda: 3  # for us; torch itself has one, as its threads do not survive a fork
case = {}, [5, 9, 30], 0, 4, 1, 7
check(case)
child = os.fork()
check(case)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_a_fork_has_threads_of_its_own():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- compiling --------------------------------------------------------------------------------------------------------


def falls_back(caplog, reason):
    """An engine works all the same, and says once why it goes by torch."""
    model = tiny_gpt()
    for _ in range(2):
        engine = Engine(model, TOKENIZER)
        assert engine.decoder is None
    [line] = [record.getMessage() for record in caplog.records]
    assert reason in line and "\n" not in line
    assert engine.complete([[1, 2]], GREEDY)[0][0].ids == list(model.generate_naive([1, 2], 5, temperature=0))


def test_without_a_compiler_torch_decodes(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    falls_back(caplog, "there is no C compiler")


def test_a_compiler_that_fails_is_told(fresh, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", script(tmp_path / "bad", "echo 'x.c: error: out of order' >&2; exit 1"))
    falls_back(caplog, "out of order")
    assert list(fresh.iterdir()) == []  # nothing half made


def test_a_compiler_that_does_not_run_is_told(fresh, monkeypatch, caplog, tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x7fELF nonsense")
    bad.chmod(0o755)
    monkeypatch.setenv("CC", str(bad))
    falls_back(caplog, "does not run")


def test_an_empty_nanochat_kernels_turns_it_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv("NANOCHAT_KERNELS", "")
    falls_back(caplog, "NANOCHAT_KERNELS is set and empty")


def test_a_folder_that_others_can_write_is_not_loaded_from(fresh, caplog):
    fresh.mkdir()
    fresh.chmod(0o777)
    falls_back(caplog, "others can write")


def test_a_folder_that_cannot_be_written_is_not_fatal(fresh, monkeypatch, caplog):
    """A model on a disk that is mounted read-only, or full."""

    def refused(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(compiled.tempfile, "mkstemp", refused)
    falls_back(caplog, "can't be written (Read-only file system); point NANOCHAT_KERNELS elsewhere")


@pytest.mark.slow
def test_a_damaged_file_is_not_fatal(fresh, caplog):
    path = compiled.made(cpu_forward.SOURCE)
    path.write_bytes(b"damaged")
    falls_back(caplog, "remove it")


@pytest.mark.slow
def test_it_is_compiled_once_and_again_for_another_compiler(fresh, monkeypatch, tmp_path):
    first = compiled.made(cpu_forward.SOURCE)
    made = first.stat().st_mtime_ns
    assert compiled.made(cpu_forward.SOURCE) == first and first.stat().st_mtime_ns == made
    real = compiled.find_compiler()
    monkeypatch.setenv("CC", script(tmp_path / "other", f'[ "$1" = --version ] && echo 99 || exec {real} "$@"'))
    second = compiled.made(cpu_forward.SOURCE)
    assert second != first and set(fresh.iterdir()) == {first, second}
    assert fresh.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_compiler_without_march_native_will_do(fresh, monkeypatch, tmp_path):
    real = compiled.find_compiler()
    refuse = f'case "$*" in *-march=native*) exit 1;; esac; exec {real} "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "plain", refuse))
    assert cpu_forward.library().panel_columns() >= 8


def test_the_cache_lies_in_the_artefact_folder(fresh, monkeypatch, base_dir):
    monkeypatch.delenv("NANOCHAT_KERNELS")
    assert compiled.folder() == base_dir / "kernels"


def test_unavailable_needs_no_engine(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(Unavailable, match="no-such-compiler"):
        compiled.made(cpu_forward.SOURCE)


@pytest.mark.slow
@pytest.mark.parametrize("source", [cpu_forward.SOURCE, *[(cpu_train.SOURCE, n) for n in (16, 32, 64)]], ids=str)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_source_has_no_warnings(compiler, source, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    source, *bits = source if isinstance(source, tuple) else (source,)
    for flags in ((compiled.NATIVE,), ("-fsyntax-only",)):  # the optimiser's warnings too; for short vectors the rest
        command = [compiler, *compiled.FLAGS, *flags, "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
        command += [f"-DREAL={n}" for n in bits] + [str(source), "-o", str(tmp_path / "strict.so"), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]


# -- drawing ----------------------------------------------------------------------------------------------------------


@st.composite
def draws(draw):
    """Rows of parameters that C serves, and a vocabulary's size."""
    chance = st.floats(0.05, 1)
    row = st.builds(
        Sampling, temperature=st.sampled_from([0, 0.3, 1, 3.7]), top_k=st.sampled_from([None, 1, 2, 50, 200]),
        top_p=chance, min_p=st.floats(0, 0.3),
    )  # fmt: skip
    rows = draw(st.lists(row.filter(lambda s: s.greedy or s.top_k) | st.just(Sampling(min_p=0.01)), min_size=1))
    return rows, draw(st.integers(200, 9000)), draw(st.integers(0, 2**31)), draw(st.integers(1, 3))


@given(draws())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_c_draws_what_torch_draws(case):
    rows, vocab, seed, threads = case
    random = torch.Generator().manual_seed(seed)
    logits, u = 3 * torch.randn(len(rows), vocab, generator=random), torch.rand(len(rows), generator=random)
    decoder = Engine(tiny_gpt(), TOKENIZER).decoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        ids = decoder.knobs(rows).draw(logits, u.tolist())
    expected = sample(logits, rows, u)
    for row in (ids != expected).nonzero().flatten().tolist():  # allowed where u lies on the border of two tokens
        near = [sample(logits[row : row + 1], [rows[row]], u[row : row + 1] + by).item() for by in (-1e-5, 1e-5)]
        assert ids[row].item() in near


def test_drawing_from_nan_stays_inside_the_vocabulary():
    decoder = Engine(tiny_gpt(), TOKENIZER).decoder
    for logits in (torch.full((3, 500), float("nan")), torch.full((3, 500), float("-inf"))):
        ids = decoder.knobs([Sampling(), Sampling(top_k=5), Sampling(temperature=0)]).draw(logits, [0.5] * 3)
        assert (ids >= 0).all() and (ids < 500).all()


def test_what_c_does_not_draw_is_drawn_by_torch():
    decoder = Engine(tiny_gpt(), TOKENIZER).decoder
    assert decoder.knobs([Sampling(top_p=0.5)]) is None and decoder.knobs([Sampling(top_k=300)]) is None
    assert decoder.knobs([Sampling(top_k=50, top_p=0.5)]) is not None
    replies = Engine(tiny_gpt(), TOKENIZER).complete([[1, 2], [3]], Sampling(top_p=0.5, seed=1, max_tokens=4))
    assert all(len(reply.ids) > 0 for group in replies for reply in group)
