"""The server over real sockets: published endpoints, limits, clients that leave, a full queue, who may enter."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from serve_rig import HELLO, events, halted, post, said, serving, until
from tiny_model import TOKENIZER, save_checkpoint

from nanochat import cli
from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serve import guard, prompts, server, worker
from nanochat.serve.api import create_app
from nanochat.serve.desk import Desk, Settings
from nanochat.serve.pool import Pool, Worker
from scripts import chat_web


@pytest.fixture(scope="module")
def hello():
    """A server that says "Hey!" to everything."""
    with serving("Hey!.") as rig:
        yield rig.url


# -- the published endpoints ------------------------------------------------------------------------------------------


def test_the_published_stream(hello):
    answer = post(hello, messages=HELLO, temperature=0.5, max_tokens=20, top_k=10)
    *tokens, done = events(answer)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert said(tokens) == "Hey!" and all(set(event) == {"token", "gpu"} and event["gpu"] == 0 for event in tokens)
    assert done == {
        "done": True,
        "finish": "stop",
        "tokens": 4,
        "parts": [{"type": "text", "text": "Hey!"}],
        "dropped": 0,
    }


def test_the_page_s_stream_has_safe_html_and_log_probabilities():
    with serving("a*b_<c>.") as rig:
        *stream, done = events(post(rig.url, messages=HELLO, html=True, logprobs=2))
    blocks = []
    for event in stream:
        if "html" in event:
            blocks[event["from"] :] = event["html"]
    assert blocks == ["<p>a*b_&lt;c&gt;</p>\n"]
    records = [record for event in stream for record in event.get("tokens", [])]
    assert [text for text, _, _ in records] == list("a*b_<c>")
    assert all(logprob <= 0 and len(top) == 2 and top[0] == [text, logprob] for text, logprob, top in records)


def test_health_stats_models_page_and_its_files(hello):
    assert httpx.get(hello + "/health").json() == {"status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1}
    assert httpx.get(hello + "/ready").json() == {"status": "ready"}
    stats = httpx.get(hello + "/stats").json()
    assert (stats["total_workers"], stats["busy_workers"]) == (1, 0) and stats["workers"][0]["device"] == "cpu"
    assert [model["id"] for model in httpx.get(hello + "/v1/models").json()["data"]] == ["test"]
    page = httpx.get(hello + "/")
    files = [page, *(httpx.get(hello + name) for name in ("/logo.svg", "/ui/chat.js", "/ui/page.css"))]
    assert [file.headers["content-type"].split(";")[0] for file in files] == [
        "text/html", "image/svg+xml", "text/javascript", "text/css",
    ]  # fmt: skip
    assert all(word not in file.text for file in files for word in ("https://", "innerHTML = text;", 'onclick="'))
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "<style" not in page.text
    for name in ("/ui/../ui.html", "/ui/%2e%2e%2fui.html", "/ui/..%2fengine.py", "/ui/none.js"):
        assert httpx.get(hello + name).status_code == 404
    for name in ("/", "/health", "/ready"):
        head = httpx.head(hello + name)
        assert head.status_code == 200 and head.content == b""
    again = httpx.get(hello + "/ui/chat.js", headers={"if-none-match": files[2].headers["etag"]})
    assert again.status_code == 304 and again.content == b""


def test_metrics_count_and_tell_no_text(hello):
    post(hello, messages=[{"role": "user", "content": "my secret diary"}])
    httpx.get(hello + "/nowhere/my-secret")
    text = httpx.get(hello + "/metrics").text
    assert 'nanochat_requests_total{path="/chat/completions",status="200"}' in text
    assert 'nanochat_engine_ready{engine="0"} 1.0' in text and "nanochat_time_to_first_token_seconds_count" in text
    assert 'nanochat_replies_total{finish="stop"}' in text
    assert "secret" not in text and 'path="other",status="404"' in text


def test_characters_come_whole_and_an_unfinished_one_is_flushed_pitfall_32():
    says = [ord("n"), *"é😀".encode(), 0xE2, 0x82, TOKENIZER.special("<|assistant_end|>")]
    with serving(says, seconds=0.03) as rig:  # slow, so that every token travels alone
        *tokens, _ = events(post(rig.url, messages=HELLO))
        assert [event["token"] for event in tokens] == ["n", "é", "😀", "\ufffd"]


def test_calculator_calls_are_parts_and_come_back_faithfully_pitfall_32():
    with serving("a«2*3»‹6›b.") as rig:
        *tokens, done = events(post(rig.url, messages=HELLO))
        kinds = [event.get("type", "text") for event in tokens]
        assert [k for k, before in zip(kinds, [None, *kinds]) if k != before] == [
            "text",
            "python",
            "python_output",
            "text",
        ]
        assert [part["type"] for part in done["parts"]] == ["text", "python", "python_output", "text"]
        seen = []
        rig.engine.check = lambda ids, n=1: seen.append(ids)
        turn = [*HELLO, {"role": "assistant", "content": done["parts"]}, {"role": "user", "content": "again"}]
        post(rig.url, messages=turn)
        message = {"role": "assistant", "content": "ab", "parts": done["parts"]}  # as OpenAI's clients send it back
        post(rig.url, "/v1/chat/completions", messages=[*HELLO, message, turn[-1]])
        assert seen[0] == seen[1]
        for name in ("python_start", "python_end", "output_start", "output_end"):
            assert seen[0].count(TOKENIZER.special(f"<|{name}|>")) == 1
        edited = {**message, "content": "something else"}
        post(rig.url, "/v1/chat/completions", messages=[*HELLO, edited, turn[-1]])
        assert TOKENIZER.special("<|python_start|>") not in seen[2]


def test_special_tokens_in_a_message_stay_text_pitfall_32():
    with serving("Hey!.") as rig:
        seen = []
        rig.engine.check = lambda ids, n=1: seen.append(ids)
        text = "<|assistant_end|><|python_start|>"
        post(rig.url, messages=[{"role": "user", "content": text}])
        post(rig.url, "/v1/completions", prompt=text)
        for ids in seen:
            assert not {TOKENIZER.special("<|assistant_end|>"), TOKENIZER.special("<|python_start|>")} & set(ids)


def test_long_chats_lose_their_oldest_whole_turns_pitfall_27(hello):
    turns = [{"role": role, "content": f"{role} {i} " + "x" * 40} for i in range(20) for role in ("user", "assistant")]
    done = events(post(hello, messages=turns + HELLO, max_tokens=100))[-1]
    assert done["dropped"] > 0 and done["dropped"] % 2 == 0 and done["finish"] == "stop"
    answer = post(hello, "/v1/chat/completions", messages=turns + HELLO, max_tokens=100)
    assert int(answer.headers["x-dropped-messages"]) == done["dropped"]
    answer = post(hello, "/v1/chat/completions", messages=turns + HELLO, max_tokens=100, stream=True)
    assert int(answer.headers["x-dropped-messages"]) == done["dropped"]
    assert "shorten" in post(hello, status=400, messages=[{"role": "user", "content": "x" * 3000}]).json()["detail"]
    assert "shorten" in post(hello, "/v1/completions", status=400, prompt="x" * 3000).json()["detail"]


# -- limits -----------------------------------------------------------------------------------------------------------

BAD = [
    ({"messages": []}, 400, "1 to 500"),
    ({"messages": HELLO * 501}, 400, "1 to 500"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
    ({"messages": [{"role": "user", "content": "x" * 8001}]}, 400, "8000"),
    ({"messages": [{"role": r, "content": "x" * 7000} for r in ("user", "assistant") * 3] + HELLO}, 400, "32000"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "robot"),
    ({"messages": [{"role": "r" * 900_000, "content": "x"}]}, 400, "message 1 has an unknown role"),
    ({"messages": HELLO * 2}, 400, "alternate"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "user"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, 400, "last message"),
    ({"messages": HELLO, "temperature": 2.1}, 400, "temperature"),
    ({"messages": HELLO, "temperature": -0.1}, 400, "temperature"),
    ({"messages": HELLO, "top_k": 201}, 400, "top_k"),
    ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": HELLO, "max_tokens": 4097}, 400, "max_tokens"),
    ({"messages": HELLO, "top_p": 0}, 400, "top_p"),
    ({"messages": HELLO, "min_p": 1.5}, 400, "min_p"),
    ({"messages": HELLO, "seed": -1}, 400, "seed"),
    ({"messages": HELLO, "seed": 10**30}, 400, "seed"),
    ({"messages": "hello"}, 422, "messages"),
    ({"messages": [{"role": "user"}]}, 422, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, 422, "content"),
    ({"messages": HELLO, "temperature": "hot"}, 422, "temperature"),
    ({"messages": HELLO, "max_tokens": True}, 422, "max_tokens"),
    ({}, 422, "messages"),
]


@pytest.mark.parametrize("body,status,words", BAD, ids=lambda x: str(x)[:40])
def test_out_of_bounds_is_refused_and_named(hello, body, status, words):
    refused = post(hello, status=status, **body)
    assert words in refused.json()["detail"] and len(refused.content) < 2000
    openai = post(hello, "/v1/chat/completions", status=400, **body).json()["error"]
    assert words in openai["message"] and openai["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "raw,statuses",
    [(b"{", (422,)), (b"\xff\xfe", (400, 422)), (b"[" * 100_000, (400, 422)), (b"", (422,)), (b"null", (422,))]
    + [(b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', (400, 422))]
    + [(b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}', (400, 422))]
    + [(b" " * (2 << 20), (413,))],
    ids=lambda x: str(x)[:20],
)
def test_bodies_that_are_no_request(hello, raw, statuses):
    answer = httpx.post(hello + "/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in statuses and "detail" in answer.json()


def test_messages_without_end_are_cut_off(hello):
    host, port = hello.removeprefix("http://").split(":")
    piece = b'{"role": "user", "content": "x"},' * 2000
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head + b'transfer-encoding: chunked\r\n\r\nd\r\n{"messages": [\r\n'.replace(b"d\r", b"e\r"))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10**9 // 30:  # a billion bytes would be thirty million messages
                client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)
        assert sent < 20 << 20  # what the limit, and the buffers on the way, hold


def test_a_body_that_hides_its_length_is_cut_off(hello):
    parts = (b" " * 65536 for _ in range(40))
    answer = httpx.post(hello + "/chat/completions", content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 413


# -- many at once, and those who leave --------------------------------------------------------------------------------


def together(url, count, **body):
    """Ask several times at once, each in a thread; returns the threads."""
    threads = [threading.Thread(target=post, args=(url,), kwargs={"messages": HELLO, **body}) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_health_answers_at_once_while_replies_are_made_pitfall_32():
    with serving(slots=2, queue=8) as rig:
        gate, threads = halted(rig), together(rig.url, 4, max_tokens=12)
        until(lambda: rig.load == 4)
        for _ in range(5):  # in the middle of a step, whose end awaits ours: a blocked event loop answers none of them
            assert httpx.get(rig.url + "/health", timeout=30).status_code == 200
        assert rig.load == 4
        gate.set()
        for thread in threads:
            thread.join()


def test_requests_share_the_steps_pitfall_26():
    with serving(slots=4) as rig:
        gate, threads = halted(rig), together(rig.url, 4, max_tokens=40)
        until(lambda: rig.load == 4)
        gate.set()
        for thread in threads:
            thread.join()
        assert rig.pool.workers[0].tokens == 160 and rig.engine.model.steps < 120  # one after the other: 160


@pytest.mark.parametrize(
    "path,stream", [("/chat/completions", True), ("/v1/chat/completions", True), ("/v1/chat/completions", False)]
)
def test_a_client_that_leaves_takes_its_reply_along_pitfall_32(path, stream):
    with serving(seconds=0.03, max_tokens=300) as rig:
        with httpx.Client() as client:
            body = {"messages": HELLO, "stream": stream}
            if stream:
                with client.stream("POST", rig.url + path, json=body) as answer:
                    next(answer.iter_text())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(rig.url + path, json=body, timeout=0.3)
        until(lambda: rig.load == 0 and not rig.engine.busy)
        assert rig.engine.stats().generated_tokens < 200  # of 300 in 9 seconds
        steps = rig.engine.model.steps
        time.sleep(0.2)
        assert rig.engine.model.steps == steps


def test_a_cancelled_reply_gets_at_most_one_more_token():
    with serving(seconds=0.02, max_tokens=300) as rig:
        worker, counts = rig.threads[0].worker, []

        class Watched(type(worker.inbox)):
            def append(self, message):
                if message.get("op") == "cancel":
                    counts.append(worker.engine.stats().generated_tokens)
                super().append(message)

        worker.inbox = Watched()
        with (
            httpx.Client() as client,
            client.stream("POST", rig.url + "/chat/completions", json={"messages": HELLO}) as answer,
        ):
            next(answer.iter_text())
        until(lambda: counts and not rig.engine.busy)
        assert rig.engine.stats().generated_tokens - counts[0] <= 1


def test_a_full_queue_is_told_at_once_pitfall_32():
    with serving(slots=1, queue=1, max_tokens=40) as rig:
        gate, threads = halted(rig), together(rig.url, 2)
        until(lambda: rig.load == 2)
        for path in ("/chat/completions", "/v1/chat/completions"):
            answer = post(rig.url, path, 429, messages=HELLO)
            assert int(answer.headers["retry-after"]) > 0 and "busy" in answer.json()["detail"]
        gate.set()
        for thread in threads:
            thread.join()
        post(rig.url, messages=HELLO, max_tokens=2)


@pytest.mark.slow
def test_one_client_cannot_take_all():
    with serving(slots=4, queue=8, at_once=2) as rig:
        gate, threads = halted(rig), together(rig.url, 2)
        until(lambda: rig.load == 2)
        answer = post(rig.url, status=429, messages=HELLO)
        assert int(answer.headers["retry-after"]) > 0 and "2 replies" in answer.json()["detail"]
        gate.set()
        for thread in threads:
            thread.join()
        post(rig.url, messages=HELLO, max_tokens=2)
    with serving("Hey!.", per_minute=2) as rig:
        for _ in range(2):
            post(rig.url, messages=HELLO)
        answer = post(rig.url, status=429, messages=HELLO)
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert httpx.get(rig.url + "/health").status_code == 200


@pytest.mark.slow
def test_a_deadline_ends_a_reply_with_what_there_is():
    with serving(seconds=0.05, deadline=2.0, max_tokens=300, slots=1) as rig:
        done = events(post(rig.url, messages=HELLO))[-1]
        assert done["finish"] == "deadline" and 1 <= done["tokens"] == len(done["parts"][0]["text"])
        choice = post(rig.url, "/v1/chat/completions", messages=HELLO).json()["choices"][0]
        assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("abc")
    with serving(seconds=1.0, deadline=0.4, slots=1) as rig:
        assert "busy" in post(rig.url, status=429, messages=HELLO).json()["detail"]  # not even a first token


def test_a_failing_step_ends_its_requests_and_not_the_server():
    with serving(seconds=0.01) as rig:
        model = rig.engine.model
        for path, body in (("/chat/completions", {}), ("/v1/chat/completions", {"stream": True})):
            model.fail = True
            post(rig.url, path, 500, messages=HELLO, **body)
            model.fail = False
            post(rig.url, path, messages=HELLO, max_tokens=3, **body)
        thread = threading.Thread(target=lambda: (until(lambda: model.steps > 20), setattr(model, "fail", True)))
        model.steps = 0
        thread.start()
        cut = post(rig.url, "/v1/chat/completions", messages=HELLO, stream=True, max_tokens=60)  # fails half way
        thread.join()
        assert "error" in events(cut)[-1] and rig.load == 0


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_requests_are_told():
    with serving(seconds=0.03, max_tokens=300) as rig:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(rig.url, messages=HELLO)))
        thread.start()
        until(lambda: rig.engine.stats().generated_tokens > 3)
        rig.threads[0].held = True
        rig.threads[0].kill()
        thread.join()
        assert events(answers[0])[-1]["finish"] == "error"
        assert httpx.get(rig.url + "/ready").status_code == 503 and httpx.get(rig.url + "/health").status_code == 200
        refused = post(rig.url, status=503, messages=HELLO)
        assert int(refused.headers["retry-after"]) > 0
        rig.threads[0].held = False
        until(lambda: rig.pool.ready)
        post(rig.url, messages=HELLO, max_tokens=2)
        assert rig.pool.workers[0].restarts == 1 and rig.threads[0].starts == 2


def cut_off(rig):
    """A client, as a thread, whose reply is under way; whether it gets an answer is no matter."""

    def ask():
        with contextlib.suppress(httpx.HTTPError):
            post(rig.url, messages=HELLO)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: rig.engine.stats().generated_tokens > 2)
    return thread


@pytest.mark.slow
def test_closing_ends_the_replies_in_flight():
    with serving(seconds=0.05, max_tokens=300) as rig:
        thread = cut_off(rig)
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.slow
def test_a_signal_drains_running_replies_finish_and_new_ones_are_refused():
    with serving(max_tokens=40, drain=60) as rig:
        answers, gate = [], halted(rig)
        thread = threading.Thread(target=lambda: answers.append(post(rig.url, messages=HELLO)))
        thread.start()
        until(lambda: rig.load == 1)
        rig.uvicorn.handle_exit(signal.SIGTERM, None)
        assert int(post(rig.url, status=503, messages=HELLO).headers["retry-after"]) > 0
        assert httpx.get(rig.url + "/ready").status_code == 503
        gate.set()
        thread.join()
        assert events(answers[0])[-1]["tokens"] == 40
        until(lambda: rig.uvicorn.should_exit)
    with serving(seconds=0.05, max_tokens=300, drain=0.2) as rig:  # those that take too long are ended
        thread = threading.Thread(target=lambda: answers.append(post(rig.url, messages=HELLO)))
        thread.start()
        until(lambda: rig.engine.stats().generated_tokens > 2)
        rig.uvicorn.handle_exit(signal.SIGTERM, None)
        thread.join()
        assert events(answers[1])[-1]["finish"] == "closing"


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_replies():
    with serving(seconds=0.1, max_tokens=300, drain=600) as rig:
        thread = cut_off(rig)
        for _ in range(2):
            assert not rig.uvicorn.should_exit
            rig.uvicorn.handle_exit(signal.SIGTERM, None)
        thread.join(25)  # the reply takes 30 seconds, and draining may take 600
        assert not thread.is_alive()
        until(lambda: rig.load == 0 and rig.engine.stats().generated_tokens < 299)


def test_while_the_model_loads_it_is_alive_and_not_ready():
    waiting = Worker("test", 0, {})
    desk = Desk.of(Pool([waiting]), TOKENIZER, Settings(Sampling()))

    async def ask():
        transport = httpx.ASGITransport(create_app(desk, run_workers=False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            paths = ("/health", "/ready", "/v1/models")
            return [await client.get(p) for p in paths], [
                await client.post(p, json=body)
                for p, body in (
                    ("/chat/completions", {"messages": HELLO}),
                    ("/v1/chat/completions", {"messages": HELLO}),
                    ("/v1/completions", {"prompt": "x"}),
                )
            ]

    (health, ready, models), refused = asyncio.run(ask())
    assert health.status_code == models.status_code == 200 and health.json()["ready"] is False
    for answer in (ready, *refused):
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert "loading" in answer.json()["detail"] and answer.json()["error"]["code"] == "not_ready"


# -- connections ------------------------------------------------------------------------------------------------------


def raw(url, data, half_close=False, seconds=30.0):
    """Send bytes on a new connection; returns all that comes until the server closes it."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        return answer


@pytest.mark.slow
def test_those_who_dawdle_are_dropped(hello, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    begin = time.monotonic()
    for data in (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he"):
        with contextlib.suppress(ConnectionResetError):
            raw(hello, data)
    head = b"POST /render HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    slow = head + b"content-length: 50\r\n\r\n{"
    assert raw(hello, slow).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - begin < 25  # with the limits that the server has by itself, 50


def test_a_half_closed_socket_holds_nothing():
    with serving(seconds=0.02, max_tokens=300) as rig:
        body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
        head = b"POST /chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        raw(rig.url, head + b"content-length: %d\r\n\r\n" % len(body) + body, half_close=True)
        until(lambda: rig.load == 0 and not rig.engine.busy)
        assert rig.engine.stats().generated_tokens < 200


def test_a_client_that_knows_no_chunks_gets_the_stream_plain(hello):
    body = json.dumps({"messages": HELLO}).encode()
    head = b"POST /chat/completions HTTP/1.%d\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    more = b"connection: close\r\ncontent-length: %d\r\n\r\n%b"
    old, new = (raw(hello, (head + more) % (minor, len(body), body)) for minor in (0, 1))
    assert b"chunked" in new.partition(b"\r\n\r\n")[0] and b"chunked" not in old.partition(b"\r\n\r\n")[0]
    stream = old.partition(b"\r\n\r\n")[2].decode()
    assert said(json.loads(line[6:]) for line in stream.split("\n\n")[:-1]) == "Hey!"


def test_only_a_long_conversation_is_encoded_beside_the_loop(monkeypatch):
    fit, threads = prompts.fit, []
    monkeypatch.setattr(prompts, "fit", lambda *ask: threads.append(threading.current_thread()) or fit(*ask))
    with serving("Hey!.") as rig:
        post(rig.url, messages=HELLO)
        talk = [{"role": role, "content": "x" * 5000} for role in ("user", "assistant")]
        post(rig.url, messages=[*talk, *HELLO])
    assert len(threads) == 2 and "asyncio" not in threads[0].name and "asyncio" in threads[1].name


def test_a_reader_that_does_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.3)
    with serving("Hey!.") as rig:
        host, port = rig.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):  # so many answers that they fill every buffer
                client.settimeout(1)
                client.sendall(b"GET /ui/chat.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * 2000)
            until(lambda: not rig.uvicorn.server_state.connections)


def test_too_many_connections_are_refused(monkeypatch):
    with serving("Hey!.") as rig:
        monkeypatch.setattr(server.Connection, "limit", 3)
        host, port = rig.url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection((host, int(port))))
            until(lambda: len(rig.uvicorn.server_state.connections) == 3)
            assert raw(rig.url, b"").startswith(b"HTTP/1.1 503")
        until(lambda: not rig.uvicorn.server_state.connections)
        assert httpx.get(rig.url + "/health").status_code == 200


# -- who may enter ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_api_key_guards_all_but_health_and_the_page():
    with serving("Hey!.", api_key="secret") as rig:
        free = ("/", "/health", "/ready", "/logo.svg", "/ui/chat.js")
        assert [httpx.get(rig.url + path).status_code for path in free] == [200] * 5
        for path in ("/stats", "/v1/models", "/metrics", "/openapi.json"):
            assert httpx.get(rig.url + path).status_code == 401
            assert httpx.get(rig.url + path, headers={"authorization": "Bearer secret"}).status_code == 200
        for key in ("Bearer wrong", "Bearer", "secret2"):
            assert "key" in post(rig.url, status=401, headers={"authorization": key}, messages=HELLO).json()["detail"]
        for path in ("/v1/chat/completions", "/v1/completions", "/render", "/v1/models/x"):
            assert httpx.post(rig.url + path, json={}).status_code == 401
        post(rig.url, headers={"authorization": "Bearer secret"}, messages=HELLO)
        post(rig.url, headers={"authorization": "bearer secret"}, messages=HELLO)  # RFC 9110: schemes have no case


def test_other_sites_cannot_use_it_pitfall_32(hello):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert post(hello, status=403, headers={"origin": origin}, messages=HELLO)
    answer = post(hello, headers={"origin": hello}, messages=HELLO)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert httpx.get(hello + "/health", headers={"host": "evil.example"}).status_code == 403


def test_no_conversation_is_logged_pitfall_32(hello, caplog, capfd):
    with caplog.at_level("DEBUG", logger="uvicorn"):
        post(hello, messages=[{"role": "user", "content": "my secret diary"}])
        post(hello, status=422, messages=[{"role": "user", "content": 1, "note": "my secret diary"}])
    out = capfd.readouterr()
    assert "diary" not in caplog.text + out.out + out.err
    assert "diary" not in post(hello, status=422, messages="my secret diary").text


def test_conversations_are_logged_when_asked(caplog):
    with caplog.at_level("INFO", logger="nanochat.serve"), serving("Hey!.", log_text=True) as rig:
        post(rig.url, messages=[{"role": "user", "content": "my open letter"}])
    assert "my open letter" in caplog.text and "Hey!" in caplog.text


# -- the script -------------------------------------------------------------------------------------------------------


def test_the_script_serves_a_checkpoint_on_loopback(base_dir, monkeypatch, capsys):
    save_checkpoint("sft", "d3")
    save_checkpoint("rl", "d3")
    seen = {}
    monkeypatch.setattr(
        server, "run", lambda app, pool, host, port, drain: seen.update(pool=pool, host=host, port=port)
    )
    chat_web.main(chat_web.Config(port=8123, source="sft,rl", num_gpus=2))
    assert seen["host"] == "127.0.0.1" and seen["port"] == 8123
    assert seen["pool"].models == ["nanochat-sft-d3", "nanochat-rl-d3"]
    assert len(seen["pool"].workers) == 4
    monkeypatch.setattr(chat_web.hardware, "cores", lambda: 16)
    assert chat_web.Config().threads() == 15 and chat_web.Config(num_gpus=2, source="sft,rl").threads() == 3
    assert "nanochat-sft-d3, nanochat-rl-d3 at http://localhost:8123" in capsys.readouterr().out
    chat_web.main(chat_web.Config(host="0.0.0.0"))
    assert "anyone" in capsys.readouterr().out
    assert chat_web.Config(host="0.0.0.0").settings().at_once > 0 == chat_web.Config().settings().at_once
    monkeypatch.setenv("NANOCHAT_API_KEY", "from outside")
    assert chat_web.Config().settings().api_key == "from outside"


def test_the_published_flags_parse():
    cfg = cli.parse(
        chat_web.Config, "-n 2 -i rl -t 0.5 -k 9 -m 99 -g d12 -s 3 -p 9000 -d float32 --host 0.0.0.0".split()
    )
    assert (cfg.num_gpus, cfg.source, cfg.temperature, cfg.top_k, cfg.max_tokens) == (2, "rl", 0.5, 9, 99)
    assert (cfg.model_tag, cfg.step, cfg.port, cfg.dtype, cfg.host) == ("d12", 3, 9000, "float32", "0.0.0.0")
    assert chat_web.Config().host == "127.0.0.1" and chat_web.Config().port == 8000


@pytest.mark.parametrize(
    "flags,words",
    [({"source": "mid"}, "mid"), ({"num_gpus": 0}, "num-gpus"), ({"port": 0}, "port"), ({"dtype": "int3"}, "int3")]
    + [
        ({"temperature": -1.0}, "temperature"),
        ({"slots": 0}, "slots"),
        ({"step": 2}, "2"),
        ({"deadline": 0.0}, "deadline"),
    ]
    + [({"api_key": "clé"}, "ASCII"), ({"api_key": " "}, "ASCII"), ({"api_key": "a\nb"}, "ASCII")]
    + [({"source": "sft,sft"}, "twice"), ({"device_type": "tpu"}, "tpu")],
    ids=str,
)
def test_mistakes_are_sentences(base_dir, flags, words):
    save_checkpoint("sft", "d3")
    with pytest.raises(UserError, match=words):
        chat_web.main(chat_web.Config(**{"device_type": "cpu", **flags}))


@pytest.mark.parametrize("int8", [False, True])
def test_an_engine_process_holds_the_weights_once_and_as_ordered(int8, base_dir):
    save_checkpoint("sft", "d3")
    [front] = chat_web.workers(chat_web.Config(device_type="cpu", int8=int8))
    engine = worker.load(front.order | {"threads": 0})  # as many as there are
    assert all(p.is_meta for p in engine.model.parameters())
    assert bool(engine.decoder.model.head.scale) == int8  # a scale for each row
    assert engine.complete([[1, 2]], Sampling(max_tokens=3))[0][0].ids


@pytest.mark.slow
def test_two_real_processes_answer_and_end_with_the_server(base_dir):
    save_checkpoint("sft", "d3", sequence_len=256)
    import psutil

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "scripts.chat_web", "-n", "2", "-p", str(port), "-m", "60", "--device-type", "cpu"]
    front = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://localhost:{port}"

    def get(path):
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(url + path)

    try:
        until(lambda: get("/health"), 60)
        loading = get("/ready").status_code
        until(lambda: get("/stats").json()["available_workers"] == 2, 60)
        assert loading in (200, 503) and get("/ready").status_code == 200
        answers = [post(url, messages=HELLO, max_tokens=5) for _ in range(2)]
        assert all(events(answer)[-1]["done"] for answer in answers)
        engines = [p for p in psutil.Process(front.pid).children() if "nanochat.serve.worker" in p.cmdline()]
        assert len(engines) == 2
        front.send_signal(signal.SIGTERM)
        assert front.wait(20) == 0
        until(lambda: not any(p.is_running() for p in engines), 10)
        out, err = front.communicate()
        assert "nanochat-sft-d3" in out and "Traceback" not in err
    finally:
        front.kill()
        front.wait()
        front.stdout.close()
        front.stderr.close()
