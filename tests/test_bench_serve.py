"""scripts/bench_serve.py: what it makes of the requests it saw. Being timed, its runs are no tests."""

import asyncio
from types import SimpleNamespace

import pytest

from nanochat.errors import UserError
from scripts import bench_serve
from scripts.bench_serve import Config, Load, Request


def test_tokens_count_as_far_as_they_came_within_the_time():
    request = Request(begin=10.0, first=1.0, each=0.1, tokens=11)  # from second 11 to 12
    assert bench_serve.share(request, 0, 100) == pytest.approx(11)
    assert bench_serve.share(request, 11.5, 100) == pytest.approx(5.5)
    assert bench_serve.share(request, 12.5, 100) == 0


def test_percentiles_are_of_the_sorted_values():
    shown = bench_serve.spread([float(x) for x in range(100, 0, -1)])
    assert (shown["p50"], shown["p95"], shown["max"]) == (51.0, 96.0, 100.0)
    assert bench_serve.spread([]) == {}


def test_warm_up_and_failures_do_not_count_as_good():
    cfg = Config(warmup=5.0, seconds=10.0, slo_first=1.0, slo_each=0.1)
    load = Load.__new__(Load)
    load.requests = [
        Request(begin=1.0, first=0.1, each=0.01, tokens=10),  # in the warm-up
        Request(begin=6.0, first=0.5, each=0.05, tokens=10),
        Request(begin=7.0, first=2.0, each=0.05, tokens=10),  # too late a first token
        Request(begin=8.0, failed="503"),
    ]
    load.health, load.memory = [], []
    shown = bench_serve.figures(cfg, load)
    assert (shown["requests"], shown["failed"]) == (3, {"503": 1})
    assert (shown["requests_per_second"], shown["goodput_per_second"]) == (0.2, 0.1)


def test_an_answer_knows_when_its_body_began_and_where_it_paused(monkeypatch):
    clock = iter([10.0, 12.0, 12.5, 16.0])
    monkeypatch.setattr(bench_serve, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    async def read():
        answer = bench_serve.Answer()
        for piece in (b"HTTP/1.1 200 OK\r\n\r\n", b"a", b"b", b"c"):
            answer.data_received(piece)
        answer.connection_lost(None)
        await answer.over
        return answer

    answer = asyncio.run(read())
    assert (answer.status, answer.first, answer.latest, answer.gap) == (200, 12.0, 16.0, 3.5)


def test_a_broken_connection_is_no_end():
    async def read():
        answer = bench_serve.Answer()
        answer.connection_lost(ConnectionResetError())
        await answer.over

    with pytest.raises(ConnectionResetError):
        asyncio.run(read())


def test_senseless_loads_are_refused():
    with pytest.raises(UserError, match="no kind of load"):
        bench_serve.check(Config(kind="mad"))
    with pytest.raises(UserError, match="1 or more"):
        bench_serve.check(Config(clients=0))
