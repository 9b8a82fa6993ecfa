"""The front's bookkeeping: where requests go, frames, limits, engine processes that hang."""

import asyncio
import io
from types import SimpleNamespace

import pytest
from serve_rig import HELLO, events, post, serving, until
from tiny_model import TOKENIZER

from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serve import limits, pool, wire, worker
from nanochat.serve.pool import Busy, NotReady, Pool, Worker, beginnings


class Quiet(Worker):
    """A worker whose process answers nothing."""

    def __init__(self, number, model="m", slots=4):
        super().__init__(model, number, {})
        self.ready, self.facts, self.said = True, {"slots": slots, "context": 100}, []

    def _say(self, message):
        self.said.append(message)


def test_frames_survive_a_pipe_and_nonsense_is_found():
    file = io.BytesIO()
    messages = [{"a": "é\ud800\n"}, {"ids": list(range(5000))}, {}]
    for message in messages:
        wire.write(file, message)
    whole = file.getvalue()
    file.seek(0)
    assert [wire.read(file) for _ in range(4)] == [*messages, None]
    assert wire.read(io.BytesIO(whole[:-1][:20])) is None  # cut in the middle: the end
    with pytest.raises(ValueError, match="out of step"):
        wire.read(io.BytesIO(b"GET / HTTP/1.1"))

    async def stream():
        reader = asyncio.StreamReader()
        reader.feed_data(whole)
        reader.feed_eof()
        return [await wire.receive(reader) for _ in range(4)]

    assert asyncio.run(stream()) == [*messages, None]


def test_the_turns_of_a_chat_go_to_the_worker_that_knows_them():
    workers = [Quiet(0), Quiet(1)]
    front = Pool(workers, queue=100)
    chats = [[chat] * 40 for chat in range(6)]
    homes = [front.submit("m", [ids], {}).worker for ids in chats]
    assert [home.number for home in homes] == [0, 1, 0, 1, 0, 1]  # new ones: to the idlest
    for ids, home in zip(chats, homes):
        assert front.submit("m", [[*ids, *ids, 7]], {}).worker is home
    short = front.submit("m", [[1, 2, 3]], {}).worker  # nothing to remember
    assert short is min(workers, key=lambda w: w.load - (w is short))


def test_a_chat_goes_elsewhere_when_its_worker_is_much_busier_or_gone():
    workers = [Quiet(0), Quiet(1)]
    front = Pool(workers, queue=100)
    ids = [5] * 64
    assert front.submit("m", [ids], {}).worker is workers[0]
    workers[0].load = workers[1].load + pool.SLACK + 1
    assert front.submit("m", [ids], {}).worker is workers[1]
    assert front.submit("m", [ids], {}).worker is workers[1]  # and is known there from now on
    workers[1].ready = False
    assert front.submit("m", [ids], {}).worker is workers[0]


def test_beginnings_depend_on_all_that_stands_before():
    one, other = beginnings(list(range(100))), beginnings([9, *range(1, 100)])
    assert len(one) == 100 // pool.BLOCK and not set(one) & set(other)
    assert beginnings(list(range(100)))[:2] == beginnings(list(range(70)))[:2]
    front = Pool([Quiet(0), Quiet(1)], queue=10**9)
    for i in range(40):
        front.submit("m", [[i] * pool.BLOCK * 1000], {})
    assert len(front._known) <= pool.REMEMBERED


def test_what_a_pool_refuses():
    front = Pool([Quiet(0, slots=1), Quiet(1, "other")], queue=1)
    assert front.models == ["m", "other"] and front.context("m") == 100
    front.submit("m", [[1]], {})
    front.submit("m", [[1]], {})
    with pytest.raises(Busy):
        front.submit("m", [[1]], {})
    front.submit("other", [[1]], {}, n=4)  # another model's queue
    front.workers[1].ready = False
    with pytest.raises(NotReady, match="loading"):
        front.submit("other", [[1]], {})
    front.draining = True
    with pytest.raises(NotReady, match="closing"):
        front.submit("m", [[1]], {})


def test_limits_by_client(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    clients = limits.Clients(at_once=3, per_minute=2)
    clients.enter("a", 2)
    with pytest.raises(limits.TooMany, match="2 replies"):
        clients.enter("a", 2)
    clients.leave("a", 2)
    clients.enter("a", 3)
    clients.enter("b", 3)
    clients.leave("a", 3)
    with pytest.raises(limits.TooMany) as wait:
        clients.enter("a", 1)
    assert 0 < wait.value.seconds <= 30
    now[0] += wait.value.seconds
    clients.enter("a", 1)
    monkeypatch.setattr(limits, "REMEMBERED", 5)
    for i in range(50):
        clients.enter(f"c{i}", 1)
        clients.leave(f"c{i}", 1)
    assert len(clients.seen) <= 7 and clients.seen["b"].replies == 3  # who has replies is not forgotten
    clients.enter("d", 1, asks=0)  # no question: the minute has as many left as before
    assert clients.seen["d"].tokens == 2
    free = limits.Clients()
    for _ in range(100):
        free.enter("a", 8)


@pytest.mark.slow
def test_a_process_that_hangs_is_replaced(monkeypatch):
    monkeypatch.setattr(pool, "STALL_SECONDS", 0.3)
    with serving(seconds=0.01) as rig:
        rig.engine.model.seconds = 3.0
        assert post(rig.url, status=500, messages=HELLO).json()["detail"].startswith("The model failed")
        rig.engine.model.seconds = 0.0
        until(lambda: rig.pool.ready and rig.threads[0].starts == 2, 10)
        assert events(post(rig.url, messages=HELLO, max_tokens=2))[-1]["tokens"] == 2


def test_a_worker_that_can_never_start_ends_the_server_with_its_sentence():
    async def refuse(order):
        reader = asyncio.StreamReader()
        reader.feed_data(wire.pack({"refused": "There is no such GPU."}))
        _, writer = await asyncio.open_connection(*address)
        return pool.Process(reader, writer, lambda: None, lambda: asyncio.sleep(0))

    async def run():
        nonlocal address
        listener = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        address = listener.sockets[0].getsockname()
        front = Pool([Worker("m", 0, {}, refuse)])
        front.start()
        while front.failed is None:
            await asyncio.sleep(0.01)
        await front.close()
        listener.close()
        return front.failed

    address = None
    failed = asyncio.run(run())
    assert isinstance(failed, UserError) and "GPU" in str(failed)


def test_two_workers_share_the_requests_and_two_models_do_not():
    with serving(workers=2, models=("test", "other"), seconds=0.01, max_tokens=10) as rig:
        for _ in range(2):
            post(rig.url, messages=HELLO)
        post(rig.url, messages=HELLO, model="other")
        tokens = [worker.tokens for worker in rig.pool.workers]
        assert sum(tokens[:2]) == 20 and sum(tokens[2:]) == 10
        gpus = {events(post(rig.url, messages=HELLO))[0]["gpu"] for _ in range(2)}
        assert gpus <= {0, 1}


def test_what_is_held_back_for_a_stop_string_is_told_when_a_reply_is_cut():
    sequence = SimpleNamespace(sampling=Sampling(stop=("bcd",), logprobs=True), tokens=list(b"abc"), cached=0)
    reply = worker.Reply(1, 0, sequence, TOKENIZER)
    for token in sequence.tokens:
        reply.feed(SimpleNamespace(token=token, logprob=0.0, top=None, finished=None))
    assert reply.pieces == [["text", "a"]] and len(reply.tokens) == 1
    reply.close("deadline")
    assert reply.pieces == [["text", "abc"]] and [record[0] for record in reply.tokens] == list("abc")


def test_showing_old_replies_is_limited_as_making_new_ones_is():
    with serving("Hey!.", at_once=2) as rig:
        body = {"messages": [[{"type": "text", "text": "*a*"}]]}
        rig.desk.clients.enter("127.0.0.1", 2)  # two replies in the making
        assert int(post(rig.url, "/render", 429, **body).headers["retry-after"]) > 0
        rig.desk.clients.leave("127.0.0.1", 1)
        assert post(rig.url, "/render", **body).json() == {"messages": [["<p><em>a</em></p>\n"]]}
        assert rig.desk.clients.seen["127.0.0.1"].replies == 1


class Piece:
    """Stands in for a reply with something to send."""

    def __init__(self, urgent):
        self.urgent = urgent

    def item(self):
        return {}


def test_text_of_many_replies_travels_in_larger_pieces_and_a_last_one_at_once(monkeypatch):
    now, sent = [100.0], []
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    engine = SimpleNamespace(busy=True)
    loop = worker.Worker(engine, None, None)
    monkeypatch.setattr(loop, "_send", sent.append)

    def flushed(after, replies, urgent=False):
        loop.replies, loop.flushed = dict.fromkeys(range(replies)), now[0]
        loop.pending = {Piece(urgent): None}
        now[0] += after
        sent.clear()
        loop._flush()
        return bool(sent)

    few, many = worker.FLUSH_SECONDS * 1.1, worker.FLUSH_SHARE * 64 * 1.1
    assert few < many / 2
    assert flushed(few, 1) and not flushed(few / 2, 1)
    assert flushed(many, 64) and not flushed(few, 64) and flushed(0, 64, urgent=True)
    loop.workers = 2  # the front has those of the other one too
    assert not flushed(many, 64) and flushed(2 * many, 64) and flushed(worker.FLUSH_MOST, 10_000)
    engine.busy = False
    assert flushed(0, 64)
