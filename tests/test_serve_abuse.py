"""Hostile requests, a short version of scripts.bench_abuse: no 5xx, nothing without an end, no growth."""

import gc
import json
import threading

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import ValidationError
from serve_rig import HELLO, events, post, serving, until

from nanochat.serve import asks, server
from scripts import bench_abuse


@pytest.fixture(scope="module")
def rig():
    """A server that says "Hey!" to everything."""
    with serving("Hey!.", queue=64) as rig:
        yield rig


def port_of(rig):
    """The rig's port."""
    return int(rig.url.rsplit(":", 1)[1])


@pytest.mark.slow
def test_dawdlers_half_closed_and_many_connects_leave_nothing_behind(rig, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
    port, state = port_of(rig), rig.uvicorn.server_state
    tasks = len(state.tasks)
    gc.collect()
    assert bench_abuse.attack_dawdling(port, 20, seconds=4)["left"] == 0
    assert "None" not in bench_abuse.attack_half_closed(port, 10)
    assert bench_abuse.attack_connects(port, 300, together=100) == {"opened": 300, "refused": 0}
    until(lambda: not state.connections and len(state.tasks) == tasks and rig.load == 0, 10)
    assert rig.desk.clients.seen["127.0.0.1"].replies == 0
    assert not rig.pool.workers[0].tickets and not rig.threads[0].worker.replies


@pytest.mark.slow
def test_what_the_schema_allows_and_forbids_is_never_a_server_error(rig):
    schema = schemathesis.openapi.from_url(rig.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/chat/completions", "/v1/chat/completions", "/render"}
    for operation in operations:

        @settings(max_examples=8, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=operation.as_strategy())
        def check(case):
            assert case.call(timeout=20).status_code < 500

        check()
    until(lambda: rig.load == 0)


@pytest.mark.slow
def test_hostile_requests_are_refused_and_harm_no_other_reply():
    small = [(path, body) for path, body in bench_abuse.hostile() if len(body) < 8000][::7]  # in time
    with serving(seconds=0.002, queue=64) as rig:
        over, whole = threading.Event(), []

        def read():
            while not over.is_set():
                whole.append(events(post(rig.url, messages=HELLO, max_tokens=40))[-1])

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: rig.load)
        statuses = [bench_abuse.send(port_of(rig), bench_abuse.head(path, len(body)) + body) for path, body in small]
        over.set()
        reader.join()
        assert {(reply["finish"], reply["tokens"]) for reply in whole} == {("length", 40)}
        assert len(small) > 60 and {400, 422} <= set(statuses) <= {200, 400, 404, 422}  # None: no end; 0: no answer
        until(lambda: rig.load == 0)


OUT = ["1000000000", "-1", "NaN", "1e999", "9" * 400]


@pytest.mark.parametrize("number", OUT, ids=lambda number: number[:9])
def test_a_number_out_of_bounds_is_refused_wherever_it_stands(rig, number):
    bodies = {"/v1/chat/completions": f'"messages": {json.dumps(HELLO)}', "/v1/completions": '"prompt": "x"'}
    for path, start in bodies.items():
        for name in ("n", "max_tokens", "top_k", "temperature", "top_p", "min_p", "logprobs", "top_logprobs"):
            if (path, name) == ("/v1/completions", "top_logprobs"):  # no field of it: ignored
                continue
            body = f'{{{start}, "{name}": {number}}}'.encode()
            assert bench_abuse.send(port_of(rig), bench_abuse.head(path, len(body)) + body) == 400, (path, name)


def test_a_fault_in_each_of_many_items_costs_no_time():
    body = {"messages": [1] * 300_000, "prompt": [None] * 300_000, "stop": [1] * 300_000}
    for form in (asks.Ask, asks.ChatAsk, asks.CompletionAsk, asks.RenderAsk):
        with pytest.raises(ValidationError) as error:
            form.model_validate(body)
        assert error.value.error_count() < 20


def test_the_verdict_sees_each_fault():
    good = {
        "requests": [{"200": 1, "400": 5, "0": 2}],
        "half_closed": {"200": 1},
        "dawdlers": {"left": 0},
        "others": {"broken": []},
        "before": {"memory": 100.0, "files": 10.0},
        "after": {"memory": 101.0, "files": 10.0},
    }
    assert bench_abuse.verdict(good) == []
    for fault, words in (
        ({"requests": [{"500": 1}]}, "500"),
        ({"half_closed": {"None": 1}}, "None"),
        ({"dawdlers": {"left": 1}}, "dawdlers"),
        ({"others": {"broken": ["x"]}}, "harmed"),
        ({"after": {"memory": 500.0, "files": 10.0}}, "grown"),
        ({"schema": {"exit_status": 1}}, "schemathesis"),
    ):
        (found,) = bench_abuse.verdict({**good, **fault})
        assert words in found
