"""The loaders: one order of rows for any number of ranks, exact resume, nothing lost, no row without targets."""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.chat import render
from nanochat.dataloader import (
    conversation_eval_batches,
    conversation_loader,
    eval_batches,
    merge_states,
    pretrain_loader,
    published_batches,
)
from nanochat.dataset import open_corpus
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

T = 16


@pytest.fixture(scope="session")
def tokenizer():
    """A real tokenizer without merges: a token is a byte."""
    return Tokenizer.from_ranks([bytes([i]) for i in range(256)])


def make_folder(folder, shards=3, documents=40, longest=40, group=16):
    """Documents of 0..`longest` letters; document i of shard s begins with its name, where it is long enough."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for s in range(shards):
        texts = [(f"{s}.{i}:" + "abcdefghijkl" * 9)[: rng.randint(0, longest)] for i in range(documents)]
        pq.write_table(pa.table({"text": texts}), folder / f"s{s}.parquet", row_group_size=group)
    return folder


@pytest.fixture
def corpus(tmp_path, base_dir):
    return open_corpus(str(make_folder(tmp_path / "data")))


def train(corpus, tokenizer, rank=0, world=1, rows=2, state=None, **options):
    options = {"seq_len": T, "buffer": 32, "lanes": 4, "prefetch": 0} | options
    return pretrain_loader(corpus, tokenizer, "train", rows=rows, rank=rank, world=world, state=state, **options)


def take(loader, n):
    with loader:
        return list(itertools.islice(loader, n))


def rows_of(batches):
    """Each row as (inputs, targets), in order."""
    return [(tuple(x), tuple(y)) for b in batches for x, y in zip(b.inputs.tolist(), b.targets.tolist())]


def global_rows(make, world, rows, count):
    """The first `count` global rows, put together from `world` ranks: row g is rank g % world's next."""
    steps = -(-count // (rows * world))
    ranks = [iter(rows_of(take(make(rank=r, world=world, rows=rows), steps))) for r in range(world)]
    return [next(ranks[g % world]) for g in range(count)]


def same(a, b):
    return all(torch.equal(x.inputs, y.inputs) and torch.equal(x.targets, y.targets) for x, y in zip(a, b, strict=True))


# -- rows


@pytest.mark.slow
def test_targets_are_the_inputs_moved_by_one_and_rows_begin_with_bos(corpus, tokenizer):
    for inputs, targets in rows_of(take(train(corpus, tokenizer), 30)):
        assert targets[:-1] == inputs[1:] and inputs[0] == tokenizer.bos and len(inputs) == T
        assert -1 not in targets


@pytest.mark.parametrize("mode", ["crop", "lossless"])
@pytest.mark.parametrize(("world", "rows"), [(2, 2), (3, 1), (4, 2), (5, 1), (8, 1), (1, 7)])
def test_ranks_together_see_what_one_would_pitfall_37(corpus, tokenizer, mode, world, rows):
    def make(**ranks):
        return train(corpus, tokenizer, mode=mode, **ranks)

    assert global_rows(make, world, rows, 60) == global_rows(make, 1, 2, 60)


def test_a_rank_tokenises_only_its_own_lanes(corpus, tokenizer, monkeypatch):
    seen = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, texts, **more: seen.append(len(texts)) or encode(self, texts, **more)
    )
    take(train(corpus, tokenizer, world=1, rows=4), 10)
    alone = sum(seen)
    seen.clear()
    take(train(corpus, tokenizer, world=4, rows=1), 10)  # the same global batches
    assert sum(seen) == pytest.approx(alone / 4, rel=0.2)


def test_a_finite_set_of_rows_says_how_many_batches_it_has_at_most(corpus, tokenizer):
    with eval_batches(corpus, tokenizer, 4, T, 20 * T, world=1) as rows:
        assert rows.total == len(list(rows)) == 5
    with eval_batches(corpus, tokenizer, 4, T, 20 * T, rank=0, world=2) as rows:
        assert rows.total == len(list(rows)) == 3
    with eval_batches(corpus, tokenizer, 4, T, None) as rows:
        assert rows.total is None


def test_more_ranks_than_row_groups_is_no_trouble_pitfall_4(tmp_path, base_dir, tokenizer):
    few = open_corpus(str(make_folder(tmp_path / "few", shards=2, documents=3, group=100)))
    for rank in range(16):
        assert len(take(train(few, tokenizer, rank=rank, world=16, lanes=8), 4)) == 4


def test_documents_are_shared_out_and_cut_as_packing_says(corpus, tokenizer):
    """Lane 0 by hand: documents 0, 4, 8, ... of the stream, packed by the naive rule."""
    with train(corpus, tokenizer, rows=1, buffer=4) as loader:
        rows = [rows_of([batch])[0] for batch in itertools.islice(loader, 20)]
    texts = [text for _, text in next(corpus.batches("train"))[1]]  # one row group
    held = [[tokenizer.bos, *text.encode()] for text in texts[::4]]
    row = []
    while len(row) < T + 1:
        room = T + 1 - len(row)
        fits = [doc for doc in held if len(doc) <= room]
        doc = max(fits, key=len) if fits else min(held, key=len)
        held.remove(doc)
        row += doc[:room]
    assert rows[0] == (tuple(row[:-1]), tuple(row[1:]))
    assert rows[4][0] != rows[0][0] and len(set(rows)) > 10


# -- resume


@pytest.mark.parametrize("mode", ["crop", "lossless"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_continues_bit_for_bit_pitfall_8(corpus, tokenizer, mode, prefetch):
    whole = take(train(corpus, tokenizer, mode=mode, prefetch=prefetch), 60)  # several epochs
    assert whole[-1].state["epoch"] >= 2
    for done in (1, 7, 30, 55):
        state = json.loads(json.dumps(whole[done - 1].state, allow_nan=False))
        rest = take(train(corpus, tokenizer, mode=mode, prefetch=prefetch, state=state), 60 - done)
        assert same(rest, whole[done:])
        assert rest[-1].state == json.loads(json.dumps(whole[-1].state))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 3), (3, 4), (8, 1)])
def test_resume_with_another_number_of_ranks_pitfall_9(corpus, tokenizer, before, after):
    def make(**ranks):
        return train(corpus, tokenizer, **ranks)

    done, count = 24, 72
    whole = global_rows(make, 1, 1, done + count)
    states = [take(make(rank=r, world=before, rows=1), done // before)[-1].state for r in range(before)]
    merged = json.loads(json.dumps(merge_states(states)))
    rest = global_rows(lambda **ranks: make(state=merged, **ranks), after, 1, count)
    assert rest == whole[done:]


def test_the_state_is_small_and_readable(corpus, tokenizer):
    state = take(train(corpus, tokenizer, lanes=8, buffer=1024), 3)[-1].state
    assert state["rows"] == 6 and state["corpus"]["val_shard"] == "s2.parquet"
    assert [name for name, _ in state["shards"]] == ["s0.parquet", "s1.parquet"]
    assert len(json.dumps(state)) < 60 * 1024


@pytest.mark.slow
def test_a_batch_says_cheaply_which_epoch_and_shard_it_came_from(corpus, tokenizer):
    with pretrain_loader(corpus, tokenizer, rows=4, seq_len=32, prefetch=0) as loader:
        seen = [(b.note.epoch, b.note.shard, b) for b in itertools.islice(loader, 300)]
    assert [s[:2] for s in seen] == sorted(s[:2] for s in seen) and len({s[:2] for s in seen}) > 2
    for epoch, shard, batch in seen[::100]:
        ends = [lane["position"] for lane in batch.state["lanes"].values()]
        assert (epoch, shard) == max((end["epoch"], end["shard"]) for end in ends)


def test_shards_added_later_do_not_shift_a_run_under_way_pitfall_11(corpus, tokenizer, tmp_path):
    whole = take(train(corpus, tokenizer), 40)
    make_folder(tmp_path / "more", shards=1)
    (tmp_path / "more" / "s0.parquet").rename(tmp_path / "data" / "s00.parquet")
    later = open_corpus(str(tmp_path / "data"))
    assert later.shards("train") == ["s0.parquet", "s00.parquet", "s1.parquet"]
    assert same(take(train(later, tokenizer, state=whole[9].state), 30), whole[10:])
    (tmp_path / "data" / "s1.parquet").unlink()
    with pytest.raises(UserError, match="s1.parquet"):
        train(open_corpus(str(tmp_path / "data")), tokenizer, state=whole[9].state)


def test_a_state_of_other_settings_or_data_is_refused(corpus, tokenizer, tmp_path, base_dir):
    state = take(train(corpus, tokenizer), 1)[-1].state
    with pytest.raises(
        UserError, match=r"2 things are wrong:\n.*mode=crop and now it is lossless.*\n.*--max-seq-len=16"
    ):
        train(corpus, tokenizer, state=state, mode="lossless", seq_len=8)
    other = open_corpus(str(make_folder(tmp_path / "other")), val_shard="s0")
    with pytest.raises(UserError, match="give the same --dataset"):
        train(other, tokenizer, state=state)
    with pytest.raises(UserError, match="lacks lanes 1.*merge"):
        train(corpus, tokenizer, rank=1, world=4, state=take(train(corpus, tokenizer, rank=0, world=4), 1)[-1].state)
    with pytest.raises(UserError, match="not of the same batch"):
        merge_states([state, state | {"rows": 99}])


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"seq_len": 0}, {"lanes": 0}, {"buffer": 1}])
def test_settings_that_make_no_sense_are_refused(corpus, tokenizer, wrong):
    with pytest.raises(UserError, match="must be 1 or more"):
        train(corpus, tokenizer, **wrong)


def test_data_without_documents_ends_with_a_sentence_not_a_spin_pitfall_4(tmp_path, base_dir, tokenizer):
    for name, texts in (("a", []), ("b", []), ("v", ["v"])):
        (tmp_path / "d").mkdir(exist_ok=True)
        table = pa.table({"text": pa.array(texts, type=pa.string())})
        pq.write_table(table, tmp_path / "d" / f"{name}.parquet")
    with train(open_corpus(str(tmp_path / "d")), tokenizer, prefetch=2) as loader:
        with pytest.raises(UserError, match="has no documents"):
            next(loader)


def test_documents_of_nothing_but_bos_still_make_rows(tmp_path, base_dir, tokenizer):
    empty = open_corpus(str(make_folder(tmp_path / "empty", shards=2, documents=1, longest=0)))
    assert set(rows_of(take(train(empty, tokenizer), 3))) == {((tokenizer.bos,) * T,) * 2}


# -- evaluation


def evaluate(corpus, tokenizer, tokens, world=1, rows=2, **options):
    """All ranks' batches of an evaluation, rank by rank."""
    make = options.pop("make", eval_batches)
    return [
        take(make(corpus, tokenizer, rows, T, tokens, rank, world, "cpu", **options), 10**6) for rank in range(world)
    ]


def real_rows(ranks):
    """The multiset of rows that have a target."""
    return Counter(row for batches in ranks for row in rows_of(batches) if set(row[1]) != {-1})


@pytest.mark.parametrize("tokens", [None, 1, 100, 333, 10**6])
@pytest.mark.parametrize(("world", "rows"), [(1, 5), (2, 1), (3, 4), (8, 2), (11, 3)])
def test_the_set_of_rows_does_not_depend_on_batch_size_or_ranks_pitfall_37(corpus, tokenizer, tokens, world, rows):
    expected = real_rows(evaluate(corpus, tokenizer, tokens))
    assert real_rows(evaluate(corpus, tokenizer, tokens, world, rows)) == expected
    if tokens in (1, 100, 333):
        assert expected.total() == -(-tokens // T)


def test_a_whole_pass_predicts_every_token_exactly_once_pitfall_21(corpus, tokenizer):
    texts = [text for _, docs in corpus.epoch_batches("val") for _, text in docs]
    predicted = Counter(target for row in real_rows(evaluate(corpus, tokenizer, None)).elements() for target in row[1])
    del predicted[-1]
    starts = predicted.pop(tokenizer.bos)  # where one document follows another within a row
    assert predicted == Counter(byte for text in texts for byte in text.encode()) and 0 < starts < len(texts)


def test_fewer_tokens_than_a_batch_are_no_trouble_pitfall_36(corpus, tokenizer):
    ((batch,),) = evaluate(corpus, tokenizer, 1, rows=8)
    assert batch.inputs.shape == (8, T)  # the shape never changes
    assert (batch.targets[1:] == -1).all() and (batch.targets[0] >= 0).any()
    with pytest.raises(UserError, match="tokens must be 1 or more"):
        eval_batches(corpus, tokenizer, 2, T, 0)


def slow_published(corpus, tokenizer, rows, buffer):
    """The published evaluation rows as its rule reads: a list scanned for every placement, 128 documents a refill."""
    stream = corpus.batches("val")
    held, out = [], []
    while len(out) < rows:
        row = []
        while len(row) < T + 1:
            while len(held) < buffer:
                held += [[tokenizer.bos, *text.encode()] for _, text in next(stream)[1]]
            room = T + 1 - len(row)
            fits = [i for i, doc in enumerate(held) if len(doc) <= room]
            shortest = min(range(len(held)), key=lambda i: len(held[i]))
            row += held.pop(max(fits, key=lambda i: len(held[i])) if fits else shortest)[:room]
        out.append((tuple(row[:-1]), tuple(row[1:])))
    return out


@pytest.mark.parametrize(("world", "rows"), [(1, 16), (2, 3)])
def test_the_published_measure_sees_the_published_rows(corpus, tokenizer, world, rows):
    """The buffer of 1,000 is larger than the 40 documents of the split, so the stream begins again, as there."""
    expected = slow_published(corpus, tokenizer, 48, 1000)
    got = evaluate(corpus, tokenizer, 48 * T, world, rows, make=published_batches)
    assert real_rows(got) == Counter(expected)
    if world == 1:
        assert rows_of(got[0]) == expected


# -- conversations


class Talk:
    """A task of n conversations; the answer to question i is i, said often enough to be `size` letters long."""

    def __init__(self, n, longest=12, seed=0):
        rng = random.Random(seed)
        self.sizes = [rng.randint(1, longest) for _ in range(n)]

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        answer = (f"{i}," * 9)[: self.sizes[i]]
        return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]}


def talk(task, tokenizer, rank=0, world=1, rows=2, state=None, **options):
    options = {"seq_len": 40, "prefetch": 0, "seed": 7} | options
    return conversation_loader(task, tokenizer, rows=rows, rank=rank, world=world, state=state, **options)


def questions(batches, tokenizer):
    """The indices of the conversations in these rows, in order."""
    text = "".join(tokenizer.decode(row) for row in torch.cat([b.inputs for b in batches]).tolist())
    return [int(part.split("<|user_end|>")[0]) for part in text.split("<|user_start|>q")[1:]]


def test_a_row_is_whole_conversations_with_the_targets_of_their_masks(tokenizer):
    task = Talk(1)
    (batch,) = take(talk(task, tokenizer, rows=1, seq_len=100), 1)
    ids, mask = render(task[0], tokenizer)
    row = batch.inputs[0].tolist() + [0]
    assert row[: len(ids)] == ids and set(row[len(ids) : -1]) == {tokenizer.bos}
    wanted = [token if learn else -1 for token, learn in zip(ids[1:], mask[1:])]
    assert batch.targets[0].tolist() == wanted + [-1] * (100 - len(wanted))


def test_conversations_longer_than_a_row_neither_stall_nor_starve_pitfall_2(tokenizer):
    """30 % of them far too long, as in the report where the fourth batch had no target."""
    task = Talk(100)
    for i in range(0, 100, 3):
        task.sizes[i] = 0
    talks = [task[i] for i in range(100)]
    for i in range(0, 100, 3):
        talks[i]["messages"][i % 2]["content"] = "x" * 500  # a long question, or a long answer
    batches = take(talk(talks, tokenizer, rows=1, buffer=16), 300)
    assert all((b.targets >= 0).any(dim=1).all() for b in batches)
    assert batches[-1].state["epoch"] >= 2


@pytest.mark.parametrize(("n", "rows", "world"), [(50, 1, 1), (50, 2, 3), (7, 4, 1), (1, 2, 2)])
def test_every_epoch_gives_every_conversation_exactly_once(tokenizer, n, rows, world):
    task = Talk(n)
    ranks = [take(talk(task, tokenizer, rank=r, world=world, rows=rows), 40) for r in range(world)]
    for count in range(40):
        seen = sum(len(questions(batches[: count + 1], tokenizer)) for batches in ranks)
        assert {batches[count].state["consumed"] for batches in ranks} == {seen}  # exact, and the same on every rank
    order = questions_in_global_order(ranks, tokenizer, rows)
    for epoch in range(len(order) // n):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def questions_in_global_order(ranks, tokenizer, rows):
    per_rank = [[batch.inputs[i : i + 1] for batch in batches for i in range(rows)] for batches in ranks]
    batch = type(ranks[0][0])
    return [q for group in zip(*per_rank) for row in group for q in questions([batch(row, row, dict)], tokenizer)]


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize(("world", "rows"), [(2, 2), (3, 1), (4, 1)])
def test_conversations_do_not_depend_on_the_number_of_ranks(tokenizer, lanes, world, rows):
    def make(**ranks):
        return talk(Talk(60), tokenizer, lanes=lanes, **ranks)

    assert global_rows(make, world, rows, 48) == global_rows(make, 1, 2, 48)


@pytest.mark.parametrize(("lanes", "prefetch"), [(1, 0), (1, 2), (4, 0)])
def test_fine_tuning_resumes_bit_for_bit_pitfall_7(tokenizer, lanes, prefetch):
    task = Talk(60)
    whole = take(talk(task, tokenizer, lanes=lanes, prefetch=prefetch), 50)
    assert whole[-1].state["epoch"] >= 3
    for done in (1, 13, 29, 49):
        state = json.loads(json.dumps(whole[done - 1].state, allow_nan=False))
        rest = take(talk(task, tokenizer, lanes=lanes, prefetch=prefetch, state=state), 50 - done)
        assert same(rest, whole[done:])


def test_the_order_is_a_matter_of_seed_and_epoch(tokenizer):
    def order(seed):
        return questions(take(talk(Talk(40), tokenizer, rows=1, seed=seed), 40), tokenizer)

    first = order(1)
    assert first == order(1) != order(2)
    assert first[:40] != sorted(first[:40]) and first[:40] != first[40:80]


def test_conversations_that_cannot_be_learnt_from_are_named(tokenizer):
    broken = [Talk(1)[0], {"messages": [{"role": "user", "content": "hello?"}]}]
    with (
        talk(broken, tokenizer, prefetch=2) as loader,
        pytest.raises(UserError, match="Conversation 1 of the training"),
    ):
        next(loader)
    with pytest.raises(UserError, match="0 conversations to train on"):
        talk([], tokenizer)
    state = take(talk(Talk(9), tokenizer), 1)[0].state
    with pytest.raises(UserError, match="conversations=9 and now it is 8"):
        talk(Talk(8), tokenizer, state=state)


@pytest.mark.parametrize("tokens", [None, 1, 200, 10**6])
@pytest.mark.parametrize(("world", "rows"), [(1, 5), (2, 3), (3, 2), (9, 1)])
def test_evaluation_conversations_do_not_depend_on_batch_size_or_ranks_pitfall_37(tokenizer, tokens, world, rows):
    def ranks(world, rows):
        options = {"rows": rows, "seq_len": 40, "tokens": tokens, "world": world}
        return [take(conversation_eval_batches(Talk(60), tokenizer, rank=r, **options), 10**6) for r in range(world)]

    one = ranks(1, 2)
    assert real_rows(ranks(world, rows)) == real_rows(one)
    asked = questions(one[0], tokenizer)
    if tokens in (None, 10**6):
        assert sorted(asked) == list(range(60))
    else:
        assert real_rows(one).total() == -(-tokens // 40)
        assert tokens == 1 or max(asked) - min(asked) > 20  # a sample, not the beginning


@pytest.mark.slow
def test_a_program_that_forgets_to_close_or_fails_still_ends(corpus, base_dir):
    code = (
        "import sys; from nanochat.dataset import open_corpus; from nanochat.tokenizer import Tokenizer\n"
        "from nanochat.dataloader import pretrain_loader\n"
        "tokenizer = Tokenizer.from_ranks([bytes([i]) for i in range(256)])\n"
        "loader = pretrain_loader(open_corpus(sys.argv[1]), tokenizer, rows=2, seq_len=16)\n"
        "next(loader)\nraise SystemExit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code, corpus.name], timeout=60, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (7, b"")


# -- real text


@pytest.mark.slow
def test_real_shards_resume_bit_for_bit_and_share_out(shared_data, base_dir):
    tokenizer = Tokenizer.from_ranks([bytes([i]) for i in range(256)])
    corpus = open_corpus(str(shared_data / "pretrain"))
    options = {"seq_len": 2048, "rows": 4, "lanes": 8, "buffer": 64, "prefetch": 2}
    whole = take(pretrain_loader(corpus, tokenizer, **options), 8)
    assert same(take(pretrain_loader(corpus, tokenizer, state=whole[4].state, **options), 3), whole[5:])
