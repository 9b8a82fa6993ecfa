"""OpenAI's own Python client, and lm-eval's way of scoring, against the server."""

import contextlib
import math
import subprocess
import threading

import httpx
import openai
import pytest
from serve_rig import HELLO, events, halted, post, serving, until
from tiny_model import TOKENIZER


@contextlib.contextmanager
def client(rig, **options):
    """OpenAI's client of a rig."""
    with openai.OpenAI(base_url=rig.url + "/v1", api_key="none", max_retries=0, **options) as made:
        yield made


@pytest.fixture(scope="module")
def alphabet():
    """A server that says the alphabet for ever, and OpenAI's client of it."""
    with serving() as rig, client(rig) as made:
        yield made


@pytest.fixture(scope="module")
def hello():
    """One that says "Hey!" and stops."""
    with serving("Hey!.", models=("test", "other")) as rig, client(rig) as made:
        yield made


def test_a_whole_chat_completion(hello):
    done = hello.chat.completions.create(model="test", messages=HELLO, n=2)
    assert done.object == "chat.completion" and done.model == "test" and done.id.startswith("chatcmpl-")
    assert [choice.index for choice in done.choices] == [0, 1]
    for choice in done.choices:
        assert choice.message.content == "Hey!" and choice.finish_reason == "stop" and choice.logprobs is None
    assert done.usage.completion_tokens == 8
    assert done.usage.total_tokens == done.usage.prompt_tokens + 8


def test_a_streamed_chat_completion_with_usage(hello):
    options = {"include_usage": True}
    chunks = list(
        hello.chat.completions.create(model="other", messages=HELLO, n=2, stream=True, stream_options=options)
    )
    *chunks, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 8 and all(chunk.usage is None for chunk in chunks)
    for i in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == i]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "stop"
        assert "".join(choice.delta.content or "" for choice in mine) == "Hey!"
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    with hello.chat.completions.create(model="test", messages=HELLO, stream=True) as stream:
        assert all(chunk.choices for chunk in stream)


def test_length_stop_strings_and_seed(alphabet):
    def choice(**body):
        return alphabet.chat.completions.create(model="test", messages=HELLO, **body).choices[0]

    cut = choice(max_completion_tokens=3)
    assert (cut.message.content, cut.finish_reason) == ("abc", "length")
    assert choice(max_tokens=4).message.content == "abcd"
    assert choice(stop="fg").message.content == "abcde" and choice(stop=["zz", "cd"]).finish_reason == "stop"
    assert choice(seed=7, temperature=1.5, top_p=0.9, extra_body={"top_k": 5, "min_p": 0.1}).message.content[0] == "a"
    stream = alphabet.chat.completions.create(model="test", messages=HELLO, stream=True, stop=["efg"])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "abcd"


def test_messages_in_openai_s_forms(hello):
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    turns = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    first = hello.chat.completions.create(model="test", messages=turns)
    turns += [first.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    assert hello.chat.completions.create(model="test", messages=turns).choices[0].message.content == "Hey!"


def test_log_probabilities_of_a_chat(alphabet):
    body = {"model": "test", "messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}
    law = alphabet.chat.completions.create(**body).choices[0].logprobs.content
    assert [record.token for record in law] == list("abcde") and law[0].bytes == [97]
    for record in law:
        assert math.isclose(math.exp(record.logprob), 1, abs_tol=1e-6) and len(record.top_logprobs) == 3
        assert record.top_logprobs[0].token == record.token
    stream = alphabet.chat.completions.create(**body, stream=True)
    records = [r for chunk in stream if chunk.choices[0].logprobs for r in chunk.choices[0].logprobs.content]
    assert [record.token for record in records] == list("abcde")


def test_completions_whole_streamed_and_of_several_prompts(alphabet):
    start = "<|assistant_start|>"
    ids = [TOKENIZER.bos, TOKENIZER.special(start)]
    done = alphabet.completions.create(model="test", prompt=ids, max_tokens=4)
    assert done.object == "text_completion" and done.choices[0].text == "abcd"
    assert done.choices[0].finish_reason == "length" and done.usage.prompt_tokens == 2
    assert alphabet.completions.create(model="test", prompt="abc", max_tokens=3, stop="f").choices[0].text == "de"
    several = alphabet.completions.create(model="test", prompt=["ab", "xy"], max_tokens=2, n=2, echo=True)
    assert [choice.text for choice in several.choices] == ["abcd", "abcd", "xyza", "xyza"]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    stream = alphabet.completions.create(model="test", prompt="ab", max_tokens=3, stream=True, logprobs=1)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in choices) == "cde" and choices[-1].finish_reason == "length"
    offsets = [offset for choice in choices if choice.logprobs for offset in choice.logprobs.text_offset]
    assert offsets == [0, 1, 2]
    stream = alphabet.completions.create(model="test", prompt="ab", max_tokens=3, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abcde"
    assert len(alphabet.completions.create(model="test", prompt="abc").choices[0].text) == 16  # OpenAI's default


def test_a_reply_of_no_tokens_says_and_counts_none(alphabet):
    body = {"model": "test", "prompt": ["abc", "xy"], "max_tokens": 0, "echo": True, "n": 2}
    done = alphabet.completions.create(**body)
    assert [choice.text for choice in done.choices] == ["abc", "abc", "xy", "xy"]
    assert {choice.finish_reason for choice in done.choices} == {"length"} and done.usage.completion_tokens == 0
    *chunks, last = alphabet.completions.create(**body, stream=True, stream_options={"include_usage": True})
    texts = {i: "".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in range(4)}
    assert list(texts.values()) == ["abc", "abc", "xy", "xy"] and last.usage.completion_tokens == 0
    assert last.usage.total_tokens == last.usage.prompt_tokens == 7  # with a bos each


def test_log_probabilities_end_where_the_text_ends(alphabet):
    whole = alphabet.completions.create(model="test", prompt="ab", stop=["fgh"], logprobs=1).choices[0]
    assert (whole.text, whole.logprobs.tokens) == ("cde", list("cde"))
    chunks = alphabet.completions.create(model="test", prompt="ab", stop=["fgh"], logprobs=1, stream=True)
    pieces = [(c.choices[0].text, c.choices[0].logprobs.tokens) for c in chunks if c.choices[0].logprobs]
    assert [text for text, _ in pieces] == ["".join(tokens) for _, tokens in pieces]
    assert "".join(text for text, _ in pieces) == "cde"
    chat = {"model": "test", "messages": HELLO, "logprobs": True}
    choice = alphabet.chat.completions.create(**chat, stop="de").choices[0]
    assert [record.token for record in choice.logprobs.content] == list("abc")
    held = alphabet.chat.completions.create(**chat, stop="dez", max_tokens=5).choices[0]  # held back in vain
    assert held.message.content == "abcde" and len(held.logprobs.content) == 5


def test_several_replies_to_several_prompts_are_streamed_each_whole(alphabet):
    body = {"model": "test", "prompt": ["ab", "xy"], "n": 2, "max_tokens": 3, "echo": True, "stream": True}
    choices = [chunk.choices[0] for chunk in alphabet.completions.create(**body)]
    for i, text in enumerate(["abcde", "abcde", "xyzab", "xyzab"]):
        mine = [choice for choice in choices if choice.index == i]
        assert "".join(choice.text for choice in mine) == text
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["length"]


def test_scoring_a_text_as_lm_eval_does(alphabet):
    done = alphabet.completions.create(model="test", prompt="abcz", max_tokens=0, echo=True, logprobs=2).choices[0]
    assert done.text == "abcz" and done.logprobs.tokens == list("abcz") and done.logprobs.text_offset == [0, 1, 2, 3]
    first, *likely, last = done.logprobs.token_logprobs
    assert first is not None and all(value > -1e-6 for value in likely) and last < -20  # z does not follow c
    assert set(done.logprobs.top_logprobs[1]) >= {"b"}
    more = alphabet.completions.create(model="test", prompt="ab", max_tokens=2, echo=True, logprobs=0).choices[0]
    assert more.logprobs.tokens == list("abcd") and more.text == "abcd"
    with pytest.raises(openai.BadRequestError, match="stream"):
        alphabet.completions.create(model="test", prompt="ab", echo=True, logprobs=1, stream=True)


def test_models(hello):
    assert [model.id for model in hello.models.list().data] == ["test", "other"]
    assert hello.models.retrieve("other").owned_by == "nanochat"
    for ask in (
        lambda: hello.models.retrieve("gpt-9"),
        lambda: hello.chat.completions.create(model="../../etc/passwd", messages=HELLO),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            ask()
        assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize(
    "body,words",
    [
        ({"n": 9}, "n must be"),
        ({"n": 0}, "n must be"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tool"),
    ],
    ids=str,
)
def test_what_we_cannot_do_is_a_bad_request(hello, body, words):
    with pytest.raises(openai.BadRequestError, match=words) as error:
        hello.chat.completions.create(**{"model": "test", "messages": HELLO, **body})
    assert error.value.type == "invalid_request_error"


def test_completions_have_bounds(hello):
    for body in (
        {"prompt": []},
        {"prompt": ""},
        {"prompt": ["x"] * 17},
        {"prompt": [10**9]},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "best_of": 3},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "logprobs": 21},
        {"prompt": [[1, 2], [-1]]},
        {"prompt": [[1, 2], [10**9]]},
        {"prompt": "x" * 32001},
    ):
        with pytest.raises(openai.BadRequestError):
            hello.completions.create(model="test", **body)


def test_a_wrong_id_in_a_later_prompt_is_refused_before_anything_begins():
    with serving() as rig, client(rig) as made:
        with pytest.raises(openai.BadRequestError, match="vocabulary"):
            made.completions.create(model="test", prompt=[[1, 2], [TOKENIZER.vocab_size]])
        assert rig.engine.stats().prompt_tokens == 0


def test_errors_have_openai_s_classes():
    with serving(slots=1, queue=0, max_tokens=30, api_key="right") as rig:
        with client(rig) as made, pytest.raises(openai.AuthenticationError) as wrong:
            made.models.list()
        assert wrong.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=rig.url + "/v1", api_key="right", max_retries=0) as made:
            create = made.chat.completions.create
            gate = halted(rig)
            thread = threading.Thread(target=create, kwargs={"model": "test", "messages": HELLO})
            thread.start()
            until(lambda: rig.load == 1)
            with pytest.raises(openai.RateLimitError) as busy:
                create(model="test", messages=HELLO)
            assert int(busy.value.response.headers["retry-after"]) > 0
            gate.set()
            thread.join()
            rig.engine.model.fail = True
            with pytest.raises(openai.InternalServerError):
                create(model="test", messages=HELLO)
            rig.engine.model.fail = False
            rig.pool.draining = True
            with pytest.raises(openai.InternalServerError) as closing:
                create(model="test", messages=HELLO)
            assert closing.value.status_code == 503


def test_a_failure_half_way_is_an_error_of_the_stream():
    with serving(seconds=0.02, max_tokens=200) as rig, client(rig) as made:
        with pytest.raises(openai.APIError, match="failed"):
            for i, _ in enumerate(made.chat.completions.create(model="test", messages=HELLO, stream=True)):
                rig.engine.model.fail = i > 2


def test_a_client_that_closes_its_stream_ends_the_reply():
    with serving(seconds=0.02, max_tokens=300) as rig, client(rig) as made:
        stream = made.chat.completions.create(model="test", messages=HELLO, stream=True)
        next(stream)
        stream.close()
        until(lambda: rig.load == 0 and not rig.engine.busy)
        assert rig.engine.stats().generated_tokens < 100


def test_curl():
    with serving("Hey!.") as rig:
        body = '{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
        command = ["curl", "-sN", rig.url + "/v1/chat/completions", "-H", "content-type: application/json", "-d", body]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except FileNotFoundError:
            pytest.skip("there is no curl on this machine")
        assert done.stdout.endswith("data: [DONE]\n\n") and '"content":"H' in done.stdout


def test_tool_steps_are_parts_of_the_answer():
    with serving("a«2*3»‹6›b.") as rig:
        message = post(rig.url, "/v1/chat/completions", messages=HELLO).json()["choices"][0]["message"]
        assert message["content"] == "ab" and [part["type"] for part in message["parts"]][1] == "python"
        stream = events(post(rig.url, "/v1/chat/completions", messages=HELLO, stream=True))
        deltas = [event["choices"][0]["delta"] for event in stream]
        assert "".join(delta.get("content") or "" for delta in deltas) == "ab"
        assert {delta["part"]["type"] for delta in deltas if "part" in delta} == {"python", "python_output"}
        assert deltas[-1]["parts"] == message["parts"]
        assert httpx.get(rig.url + "/openapi.json").status_code == 200
