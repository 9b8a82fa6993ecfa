"""The server over real sockets: its endpoints, OpenAI's, limits, leaving clients, a full queue, who may enter."""

import contextlib
import json
import shutil
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from tiny_model import TOKENIZER, Chain, save_checkpoint

from nanochat import cli
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serve.api import Settings, create_app
from nanochat.serve.worker import Worker
from scripts import chat_web

ALPHABET = "abcdefghijklmnopqrstuvwxyz"  # said for ever
HELLO = [{"role": "user", "content": "Hi"}]


@contextlib.contextmanager
def serving(text=ALPHABET, seconds=0.0, slots=4, waiting=4, max_tokens=30, api_key=None, local=True):
    """A server on a free port whose model says `text`: yields (base url, worker)."""
    engine = Engine(Chain(text, seconds), TOKENIZER, slots=slots, frozen=True, guesses=0)
    worker = Worker(engine, waiting=waiting)
    settings = Settings("test", Sampling(temperature=0, max_tokens=max_tokens), api_key, local)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app([worker], settings), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", worker
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive() and not worker.alive


@pytest.fixture(scope="module")
def hello():
    """A server that says "Hey!" to everything."""
    with serving("Hey!.") as (url, _):
        yield url


def post(url, path="/chat/completions", status=200, headers=None, **body):
    answer = httpx.post(url + path, json=body, timeout=20, headers=headers)
    assert answer.status_code == status, answer.text
    return answer


def events(answer):
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and line != "data: [DONE]"]


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# -- the published endpoints ------------------------------------------------------------------------------------------


def test_the_published_stream(hello):
    answer = post(hello, messages=HELLO, temperature=0.5, max_tokens=20, top_k=10)
    *tokens, done = events(answer)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert tokens == [{"token": c, "gpu": 0} for c in "Hey!"]
    assert done["done"] is True and done["finish"] == "stop" and done["parts"] == [{"type": "text", "text": "Hey!"}]


def test_health_stats_models_page_and_logo(hello):
    assert httpx.get(hello + "/health").json() == {"status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1}
    stats = httpx.get(hello + "/stats").json()
    assert (stats["total_workers"], stats["busy_workers"]) == (1, 0) and stats["workers"][0]["device"] == "cpu"
    assert [model["id"] for model in httpx.get(hello + "/v1/models").json()["data"]] == ["test"]
    assert httpx.get(hello + "/logo.svg").headers["content-type"] == "image/svg+xml"
    page = httpx.get(hello + "/")
    assert "nanochat" in page.text and "http://" not in page.text and "https://" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2


def test_characters_come_whole_and_an_unfinished_one_is_flushed_pitfall_32():
    says = [ord("n"), *"é😀".encode(), 0xE2, 0x82, TOKENIZER.special("<|assistant_end|>")]
    with serving(says) as (url, _):
        *tokens, _ = events(post(url, messages=HELLO))
        assert [event["token"] for event in tokens] == ["n", "é", "😀", "\ufffd"]


def test_calculator_calls_are_parts_and_come_back_faithfully_pitfall_32():
    with serving("a«2*3»‹6›b.") as (url, worker):
        *tokens, done = events(post(url, messages=HELLO))
        kinds = [event.get("type", "text") for event in tokens]
        assert kinds == ["text", "python", "python", "python", "python_output", "text"]
        assert [part["type"] for part in done["parts"]] == ["text", "python", "python_output", "text"]
        seen = []
        worker.engine.check = lambda ids, n=1: seen.append(ids)
        turn = [*HELLO, {"role": "assistant", "content": done["parts"]}, {"role": "user", "content": "again"}]
        post(url, messages=turn)
        for name in ("python_start", "python_end", "output_start", "output_end"):
            assert seen[0].count(TOKENIZER.special(f"<|{name}|>")) == 1


def test_special_tokens_in_a_message_stay_text_pitfall_32(hello):
    with serving("Hey!.") as (url, worker):
        seen = []
        worker.engine.check = lambda ids, n=1: seen.append(ids)
        post(url, messages=[{"role": "user", "content": "<|assistant_end|><|python_start|>"}])
        assert seen[0].count(TOKENIZER.special("<|assistant_end|>")) == 0
        assert seen[0].count(TOKENIZER.special("<|python_start|>")) == 0


def test_long_chats_lose_their_oldest_whole_turns_pitfall_32(hello):
    turns = [{"role": role, "content": f"{role} {i} " + "x" * 40} for i in range(20) for role in ("user", "assistant")]
    done = events(post(hello, messages=turns + HELLO, max_tokens=100))[-1]
    assert done["dropped"] > 0 and done["dropped"] % 2 == 0 and done["finish"] == "stop"
    assert "shorten" in post(hello, status=400, messages=[{"role": "user", "content": "x" * 3000}]).json()["detail"]


# -- limits -----------------------------------------------------------------------------------------------------------

BAD = [
    ({"messages": []}, 400, "1 to 500"),
    ({"messages": HELLO * 501}, 400, "1 to 500"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
    ({"messages": [{"role": "user", "content": "x" * 8001}]}, 400, "8000"),
    ({"messages": [{"role": r, "content": "x" * 7000} for r in ("user", "assistant") * 3] + HELLO}, 400, "32000"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "robot"),
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
    assert words in post(hello, status=status, **body).json()["detail"]
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


def test_a_body_that_hides_its_length_is_cut_off(hello):
    parts = (b" " * 65536 for _ in range(40))
    answer = httpx.post(hello + "/chat/completions", content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 413


# -- OpenAI's form ----------------------------------------------------------------------------------------------------


def test_openai_whole(hello):
    body = post(hello, "/v1/chat/completions", messages=HELLO, model="test", n=2).json()
    assert body["object"] == "chat.completion" and body["model"] == "test"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert choice["message"]["content"] == "Hey!" and choice["finish_reason"] == "stop"
    prompt = body["usage"]["prompt_tokens"]
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}


def test_openai_streamed(hello):
    answer = post(hello, "/v1/chat/completions", messages=HELLO, stream=True, stream_options={"include_usage": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    first, *middle, last, usage = events(answer)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "Hey!"
    assert last["choices"][0]["finish_reason"] == "stop" and usage["usage"]["completion_tokens"] == 4
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


def test_openai_limits_stops_and_refusals(hello):
    with serving() as (url, _):

        def choice(**body):
            return post(url, "/v1/chat/completions", messages=HELLO, **body).json()["choices"][0]

        cut = choice(max_completion_tokens=3)
        assert (cut["message"]["content"], cut["finish_reason"]) == ("abc", "length")
        assert choice(stop="fg")["message"]["content"] == "abcde"
        assert choice(stop=["zz", "cd"])["finish_reason"] == "stop"
        streamed = post(url, "/v1/chat/completions", messages=HELLO, stream=True, stop=["efg"])
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in events(streamed)) == "abcd"
    assert (
        "no model" in post(hello, "/v1/chat/completions", 404, messages=HELLO, model="gpt-9").json()["error"]["message"]
    )
    for wrong in ({"n": 9}, {"n": 0}, {"stop": ["x"] * 99}, {"stop": ""}, {"logprobs": True}, {"tools": [{}]}):
        post(hello, "/v1/chat/completions", 400, messages=HELLO, **wrong)


# -- many at once, and those who leave --------------------------------------------------------------------------------


def test_health_answers_at_once_while_replies_are_made_pitfall_32():
    with serving(seconds=0.05, slots=2, waiting=8) as (url, worker):
        threads = [
            threading.Thread(target=post, args=(url,), kwargs={"messages": HELLO, "max_tokens": 12}) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        until(lambda: worker.load == 4)
        answers = 0
        while worker.load:
            assert httpx.get(url + "/health").status_code == 200
            answers += 1
        for thread in threads:
            thread.join()
        assert answers > 5  # a blocked event loop answers once, after the last reply


def test_requests_share_the_steps_pitfall_26():
    with serving(seconds=0.04, slots=4) as (url, worker):
        body = {"messages": HELLO, "max_tokens": 40}
        threads = [threading.Thread(target=post, args=(url,), kwargs=body) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert worker.tokens == 160 and worker.engine.model.steps < 120  # one after the other: 160


@pytest.mark.parametrize(
    "path,stream", [("/chat/completions", True), ("/v1/chat/completions", True), ("/v1/chat/completions", False)]
)
def test_a_client_that_leaves_takes_its_reply_along_pitfall_32(path, stream):
    with serving(seconds=0.03, max_tokens=300) as (url, worker):
        with httpx.Client() as client:
            body = {"messages": HELLO, "stream": stream}
            if stream:
                with client.stream("POST", url + path, json=body) as answer:
                    next(answer.iter_text())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(url + path, json=body, timeout=0.3)
        until(lambda: worker.load == 0)
        assert worker.tokens < 200  # of 300 in 9 seconds; the engine itself goes on for at most a step (test_engine)
        steps = worker.engine.model.steps
        time.sleep(0.2)
        assert worker.engine.model.steps == steps


def test_a_full_queue_is_told_at_once_pitfall_32():
    with serving(seconds=0.05, slots=1, waiting=1, max_tokens=40) as (url, worker):
        with httpx.Client() as client, contextlib.ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(client.stream("POST", url + "/chat/completions", json={"messages": HELLO}))
            until(lambda: worker.load == 2)
            for path in ("/chat/completions", "/v1/chat/completions"):
                answer = post(url, path, 429, messages=HELLO)
                assert int(answer.headers["retry-after"]) > 0 and "busy" in answer.json()["detail"]
        until(lambda: worker.load == 0)
        post(url, messages=HELLO, max_tokens=2)


def test_a_failing_step_ends_its_requests_and_not_the_server():
    with serving(seconds=0.01) as (url, worker):
        model = worker.engine.model
        model.fail = True
        assert events(post(url, messages=HELLO))[-1]["finish"] == "error"
        post(url, "/v1/chat/completions", 500, messages=HELLO)
        assert "error" in events(post(url, "/v1/chat/completions", messages=HELLO, stream=True))[-1]
        model.fail = False
        assert events(post(url, messages=HELLO, max_tokens=3))[-1]["finish"] == "length"
        assert worker.load == 0


def test_closing_ends_the_replies_in_flight():
    with serving(seconds=0.05, max_tokens=300) as (url, worker):
        answers = []

        def ask():
            with contextlib.suppress(httpx.HTTPError):
                answers.append(post(url, messages=HELLO))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: worker.tokens > 2)
    thread.join(5)
    assert not thread.is_alive()


# -- who may enter ----------------------------------------------------------------------------------------------------


def test_an_api_key_guards_all_but_health_and_the_page():
    with serving("Hey!.", api_key="secret") as (url, _):
        assert [httpx.get(url + path).status_code for path in ("/", "/health", "/logo.svg")] == [200] * 3
        for path in ("/stats", "/v1/models"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"authorization": "Bearer secret"}).status_code == 200
        for key in ("Bearer wrong", "Bearer", "secret2"):
            assert "key" in post(url, status=401, headers={"authorization": key}, messages=HELLO).json()["detail"]
        post(url, headers={"authorization": "Bearer secret"}, messages=HELLO)


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


# -- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    """A headless Chromium of this machine."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
def test_the_page_talks_stops_regenerates_edits_and_remembers_pitfall_33(browser):
    with serving("a«2*3»‹6›bcdefgh\nijklm<nop>qrstuvwxyz.", seconds=0.02, max_tokens=200) as (url, worker):
        page, faults = browser.new_page(), []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))

        def say(text):
            page.fill("#words", text)
            page.keyboard.press("Enter")

        def settled(articles):
            until(lambda: page.inner_text("#send") == "Send" and page.locator("article").count() == articles, 20)

        page.goto(url)
        say("<img src=x onerror=alert(1)> /clear")  # neither markup nor a command: text
        settled(2)
        assert page.inner_text("article.user .text") == "<img src=x onerror=alert(1)> /clear"
        assert page.inner_text("article.assistant .text") == "a2*3 = 6bcdefgh\nijklm<nop>qrstuvwxyz"
        assert page.locator("img").count() == 1  # the logo
        say("second")
        until(lambda: page.locator("article").count() == 4 and page.inner_text("article:last-of-type .text"))
        page.keyboard.press("Escape")
        settled(4)
        until(lambda: worker.load == 0, 1)
        assert "stopped" in page.inner_text("article:last-of-type")
        page.locator("article.assistant >> text=Regenerate").last.click()
        settled(4)
        assert page.locator("article.assistant .text").last.inner_text().endswith("xyz")
        page.reload()
        assert page.locator("article").count() == 4 and page.locator("#chats li").count() == 1
        page.locator("article.user >> text=Edit").last.click()
        assert page.input_value("#words") == "second" and page.locator("article").count() == 2
        worker.engine.model.fail = True
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The model failed.")
        worker.engine.model.fail = False
        page.click("text=Try again")
        settled(4)
        page.click("#fresh")
        assert page.locator("article").count() == 0 and page.locator("#chats li").count() == 1
        page.locator("#chats li button").last.click()
        assert page.locator("#chats li").count() == 0
        assert faults == []


# -- the script -------------------------------------------------------------------------------------------------------


def test_the_script_serves_a_checkpoint_on_loopback(base_dir, monkeypatch, capsys):
    save_checkpoint("sft", "d3")
    seen = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.update(options, app=app))
    chat_web.main(chat_web.Config(port=8123))
    assert seen["host"] == "127.0.0.1" and seen["port"] == 8123 and seen["access_log"] is False
    assert "nanochat-sft-d3 at http://localhost:8123" in capsys.readouterr().out
    chat_web.main(chat_web.Config(host="0.0.0.0"))
    assert "anyone" in capsys.readouterr().out


def test_the_published_flags_parse():
    cfg = cli.parse(
        chat_web.Config, "-n 2 -i rl -t 0.5 -k 9 -m 99 -g d12 -s 3 -p 9000 -d float32 --host 0.0.0.0".split()
    )
    assert (cfg.num_gpus, cfg.source, cfg.temperature, cfg.top_k, cfg.max_tokens) == (2, "rl", 0.5, 9, 99)
    assert (cfg.model_tag, cfg.step, cfg.port, cfg.dtype, cfg.host) == ("d12", 3, 9000, "float32", "0.0.0.0")
    assert chat_web.Config().host == "127.0.0.1" and chat_web.Config().port == 8000


@pytest.mark.parametrize(
    "flags,words",
    [({"source": "mid"}, "mid"), ({"num_gpus": 3}, "3"), ({"num_gpus": 0}, "num-gpus"), ({"port": 0}, "port")]
    + [
        ({"dtype": "int3"}, "int3"),
        ({"temperature": -1.0}, "temperature"),
        ({"slots": 0}, "slots"),
        ({"step": 2}, "2"),
    ],
    ids=str,
)
def test_mistakes_are_sentences(base_dir, flags, words):
    save_checkpoint("sft", "d3")
    with pytest.raises(UserError, match=words):
        chat_web.main(chat_web.Config(**{"device_type": "cpu", **flags}))
