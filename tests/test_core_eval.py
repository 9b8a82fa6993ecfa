"""CORE: hand-computed items of each kind, prompts as published, batching that changes nothing, whole bundles."""

import dataclasses
import json
import math
import random
import zipfile
from types import SimpleNamespace

import pytest
import torch
import tqdm

from nanochat import core_eval
from nanochat.core_eval import Row, Spec
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

RT = Runtime.single()
MC = Spec("mc", "multiple_choice", "mc.jsonl", 0, " ", 0.25)
SC = Spec("sc", "schema", "sc.jsonl", 0, " ", 0.5)
LM = Spec("lm", "language_modeling", "lm.jsonl", 0, "=", 0.0)


class Letters:
    """A tokenizer of one token a character; bos is 0."""

    bos = 0

    def encode(self, texts, prepend=None):
        return [([] if prepend is None else [prepend]) + [ord(c) for c in text] for text in texts]


class Bigrams:
    """A model whose next token depends on the current one only: probabilities {(a, b): p}, the rest shared evenly."""

    def __init__(self, probabilities, context=64):
        self.config = SimpleNamespace(sequence_len=context, vocab_size=128)
        p = torch.full((128, 128), math.nan)
        for (a, b), value in probabilities.items():
            p[ord(a), ord(b)] = value
        rest = (1 - p.nansum(1, keepdim=True)) / p.isnan().sum(1, keepdim=True)
        self.logits = torch.where(p.isnan(), rest, p).log()
        self.seen = []

    def __call__(self, ids, last):
        self.seen.append(tuple(ids.shape))
        return self.logits[ids.gather(1, last)]


def right(model, spec, item, **more):
    return core_eval.Scorer(model, Letters(), RT, **more).right(spec, [item], [0])[0]


# ---- each kind by hand -----------------------------------------------------------------------------------------------


def test_multiple_choice_takes_the_lowest_mean_loss_after_what_the_choices_share():
    # "a" -> x has 0.5, then x -> y has 0.1: mean -(ln 0.5 + ln 0.1) / 2 = 1.50. "a" -> z has 0.25: 1.39, so z wins by
    # the mean, as it would not by the sum or by the first token.
    model = Bigrams({("a", "x"): 0.5, ("x", "y"): 0.1, ("a", "z"): 0.25})
    item = {"query": "q", "choices": ["axy", "az"], "gold": 1}
    assert right(model, MC, item) and not right(model, MC, item | {"gold": 0})
    losses, _ = core_eval.score(model, core_eval.rows_of(MC, Letters().encode(["q axy", "q az"], 0), 64), 0, RT.device)
    assert losses == pytest.approx([-(math.log(0.5) + math.log(0.1)) / 2, -math.log(0.25)], rel=1e-5)


def test_schema_takes_the_context_after_which_the_shared_ending_is_likeliest():
    # Only the ending "s" after "t" is shared: P(s | t) does not differ in a bigram model, so the contexts' last letters
    # must: "xs" and "ys" share "s" alone, P(s | x) = 0.3 and P(s | y) = 0.2.
    model = Bigrams({("x", "s"): 0.3, ("y", "s"): 0.2})
    spec = Spec("sc", "schema", "", 0, "", 0.5)
    item = {"context_options": ["long y", "x"], "continuation": "s", "gold": 1}
    assert right(model, spec, item) and not right(model, spec, item | {"gold": 0})


def test_language_modelling_wants_every_token_to_be_the_first_guess():
    model = Bigrams({("=", "4"): 0.9, ("4", "2"): 0.9})
    item = {"context": " six times seven ", "continuation": "42"}
    assert right(model, LM, item)
    assert not right(model, LM, item | {"continuation": "43"})
    assert not right(model, LM, item | {"continuation": "52"})


def test_a_choice_that_the_other_begins_with_is_handled_as_published():
    model = Bigrams({})
    for choices in (["a", "ab"], ["ab", "a"]):
        assert right(model, MC, {"query": "q", "choices": choices, "gold": 0})


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_have_the_published_shapes():
    mc = [{"query": f"Q{i}", "choices": ["no", "yes"], "gold": i % 2} for i in range(3)]
    assert core_eval.prompts(MC, mc[0], mc[1:]) == [
        "Q1 yes\n\nQ2 no\n\nQ0 no",
        "Q1 yes\n\nQ2 no\n\nQ0 yes",
    ]
    sc = [{"context_options": ["A", "B"], "continuation": "went.", "gold": i} for i in range(2)]
    assert core_eval.prompts(SC, sc[0], sc[1:]) == ["B went.\n\nA went.", "B went.\n\nB went."]
    lm = [{"context": f" C{i} \n", "continuation": f"w{i}"} for i in range(2)]
    spec = Spec("lm", "language_modeling", "", 1, "\nAnswer: ", 0.0)
    assert core_eval.prompts(spec, lm[0], lm[1:]) == [
        "C1\nAnswer: w1\n\nC0\nAnswer:",
        "C1\nAnswer: w1\n\nC0\nAnswer: w0",
    ]


def test_shots_are_the_published_draw_from_all_other_items():
    items = [{"i": i} for i in range(50)]
    for i in (0, 7, 49):
        others = [j for j in range(50) if j != i]
        published = random.Random(1234 + i).sample(others, 10)
        assert [shot["i"] for shot in core_eval.shots_of(items, i, 10)] == published


def test_few_items_give_fewer_shots_and_no_error_pitfall_34():
    assert core_eval.shots_of([{"i": 0}], 0, 10) == []
    assert sorted(s["i"] for s in core_eval.shots_of([{"i": i} for i in range(4)], 2, 10)) == [0, 1, 3]


def test_long_prompts_keep_their_last_tokens_and_their_span_pitfall_34():
    tokens = Letters().encode(["0123456789ab", "0123456789cd"], 0)
    rows = core_eval.rows_of(MC, tokens, context=5)
    assert [bytes(row.ids) for row in rows] == [b"789ab", b"789cd"] and [row.start for row in rows] == [3, 3]
    all_scored = core_eval.rows_of(MC, tokens, context=2)
    assert [row.start for row in all_scored] == [1, 1]  # the first token is predicted from nothing
    model = Bigrams({(" ", "c"): 0.5}, context=5)
    assert right(model, MC, {"query": "0123456789", "choices": ["a", "c"], "gold": 1})
    assert all(length <= 5 for _, length in model.seen)


# ---- batching --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    model = GPT(GPTConfig(sequence_len=64, vocab_size=128, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
                          window_pattern="24,L"))  # fmt: skip
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model.eval()


def test_rows_scored_together_have_the_scores_of_one_at_a_time_pitfall_34(gpt):
    rng = random.Random(0)
    rows = []
    for _ in range(20):
        length = rng.randint(3, 60)
        rows.append(Row([rng.randrange(128) for _ in range(length)], rng.randint(1, length - 1)))
    together, hits = core_eval.score(gpt, rows, 0, RT.device)
    alone = [core_eval.score(gpt, [row], 0, RT.device) for row in rows]
    assert together == pytest.approx([losses[0] for losses, _ in alone], abs=1e-5)
    assert hits == [hit[0] for _, hit in alone]


def questions(rng, count=5):
    """Rows of some questions, each with its few-shot beginning of 35 to 50 tokens and two to four choices."""
    groups = []
    for _ in range(count):
        begin = [rng.randrange(128) for _ in range(rng.randint(35, 50))]
        choices = [[i] + [rng.randrange(128) for _ in range(rng.randint(0, 8))] for i in range(rng.randint(2, 4))]
        groups.append([Row(begin + choice, len(begin)) for choice in choices])
    return groups


def test_what_choices_share_is_read_once_and_the_scores_stay_pitfall_34(gpt):
    groups = questions(random.Random(3))
    rows = [row for group in groups for row in group]
    owners = [g for g, group in enumerate(groups) for _ in group]
    read = []
    hook = gpt.transformer.wte.register_forward_hook(lambda m, a, y: read.append(a[0].numel()))
    losses, hits = core_eval.score(gpt, rows, 0, RT.device)
    whole, read[:] = sum(read), []
    found, found_hits = core_eval.score_shared(gpt, rows, owners, 0, RT.device)
    hook.remove()
    assert found == pytest.approx(losses, abs=1e-5) and found_hits == hits
    assert sum(read) < 0.6 * whole


def test_a_task_shares_where_it_pays_and_its_verdicts_stay_pitfall_34(gpt, monkeypatch):
    items = [{"query": c * 8, "choices": ["one", "two", "three"], "gold": 1} for c in "abcdef"]
    spec = Spec("mc", "multiple_choice", "mc.jsonl", 2, " ", 0.25)
    scorer, calls = core_eval.Scorer(gpt, Letters(), RT), []
    shared = core_eval.score_shared
    monkeypatch.setattr(core_eval, "score_shared", lambda *a: calls.append(1) or shared(*a))
    verdicts = scorer.right(spec, items, range(6))
    monkeypatch.setattr(core_eval, "SHARED_AT_LEAST", 1000)
    assert calls and scorer.right(spec, items, range(6)) == verdicts and len(calls) == 1


def test_scores_are_those_of_the_full_logits(gpt):
    row = Row(list(range(10, 40)), 20)
    (loss,), (hit,) = core_eval.score(gpt, [row], 0, RT.device)
    with torch.no_grad():
        logits = gpt(torch.tensor([row.ids]))[0]
    expected = torch.nn.functional.cross_entropy(logits[19:-1], torch.tensor(row.ids[20:]))
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert hit == bool((logits[19:-1].argmax(-1) == torch.tensor(row.ids[20:])).all())


def test_batches_hold_every_row_once_within_the_budgets():
    rng = random.Random(0)
    rows = [Row([0] * rng.randint(2, 50), 1) for _ in range(40)]
    groups = list(core_eval.batches(rows, tokens=120, positions=100))
    assert sorted(i for group in groups for i in group) == list(range(40))
    for group in groups:
        longest = max(len(rows[i].ids) for i in group)
        assert len(group) == 1 or len(group) * longest <= 120 and len(group) * (longest - 1) <= 100
    assert [len(g) for g in core_eval.batches([Row([0] * 99, 1)], tokens=10, positions=10)] == [1]


# ---- a whole bundle --------------------------------------------------------------------------------------------------


def write_bundle(folder, shots=2, n=20):
    """Two tasks that a model of letters can do by heart: 'a' is followed by 'b'."""
    top = folder / "eval_bundle"
    (top / "eval_data" / "x").mkdir(parents=True)
    (top / "core.yaml").write_text(
        f"""icl_tasks:
- {{label: choose, dataset_uri: x/mc.jsonl, num_fewshot: [{shots}], icl_task_type: multiple_choice}}
- {{label: say, dataset_uri: x/lm.jsonl, num_fewshot: [{shots}], icl_task_type: language_modeling}}
"""
    )
    (top / "eval_meta_data.csv").write_text('Eval Task,Random baseline,Description\nchoose,25,"a, b"\nsay,0,"c\nd"\n')
    mc = [{"query": "x", "choices": ["a", "b", "c"], "gold": 1 if i < n // 2 else 0} for i in range(n)]
    lm = [{"context": f"{i}", "continuation": "b"} for i in range(n)]
    for name, items in (("mc", mc), ("lm", lm)):
        (top / "eval_data" / "x" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    return top


MODEL = {(" ", "b"): 0.9} | {(str(digit), " "): 0.9 for digit in range(10)}


def test_core_is_the_mean_of_the_centred_accuracies(tmp_path):
    bundle = core_eval.Bundle(write_bundle(tmp_path))
    lines = []
    results = core_eval.evaluate(Bigrams(MODEL), Letters(), bundle, runtime=RT, say=lines.append)
    assert results["tasks"]["choose"]["accuracy"] == 0.5
    assert results["tasks"]["choose"]["centered"] == pytest.approx((0.5 - 0.25) / 0.75)
    assert results["tasks"]["say"]["accuracy"] == results["tasks"]["say"]["centered"] == 1.0
    assert results["core"] == pytest.approx((1 / 3 + 1) / 2)
    assert len(lines) == 2 and lines[0].startswith("choose ")
    rows = [[cell.strip() for cell in row.split(",")] for row in core_eval.table(results).splitlines()]
    assert rows[0] == ["Task", "Accuracy", "Centered"] and rows[-1] == ["CORE", "", "0.666667"]


class Listening(Letters):
    """Keeps what it was asked to encode."""

    def __init__(self):
        self.texts = []

    def encode(self, texts, prepend=None):
        self.texts.append(texts)
        return super().encode(texts, prepend)


def test_a_limit_asks_fewer_items_with_the_same_prompts_pitfall_34(tmp_path):
    bundle = core_eval.Bundle(write_bundle(tmp_path, shots=10))
    few, every = Listening(), Listening()
    results = core_eval.evaluate(Bigrams({}), few, bundle, max_per_task=3, runtime=RT)
    assert [one["n"] for one in results["tasks"].values()] == [3, 3]
    core_eval.evaluate(Bigrams({}), every, bundle, runtime=RT)
    for asked, all_asked, prompts_an_item in zip(few.texts, every.texts, (3, 2), strict=True):
        assert len(asked) == 3 * prompts_an_item and asked == all_asked[: len(asked)]
        assert all(text.count("\n\n") == 10 for text in asked)  # as many shots as ever


def test_each_task_has_a_bar_that_ends_full_on_the_main_rank_pitfall_51(tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(core_eval, "EXAMPLES_TOGETHER", 7)
    bundle = core_eval.Bundle(write_bundle(tmp_path))
    core_eval.evaluate(Bigrams(MODEL), Letters(), bundle, runtime=RT)
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [("choose", 20, 20), ("say", 20, 20)]
    core_eval.Scorer(Bigrams(MODEL), Letters(), dataclasses.replace(RT, rank=1)).task(bundle, bundle.specs()[0])
    assert bars[-1].disable


def test_zip_and_folder_give_the_same(tmp_path):
    top = write_bundle(tmp_path)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for path in top.rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    ways = [core_eval.Bundle(path) for path in (tmp_path / "b.zip", top, tmp_path)]
    assert ways[0].specs() == ways[1].specs() == ways[2].specs()
    assert ways[0].items(ways[0].specs()[0]) == ways[1].items(ways[1].specs()[0])


def test_what_is_no_bundle_is_named(tmp_path, base_dir, monkeypatch):
    with pytest.raises(UserError, match="does not exist.*NANOCHAT_EVAL_BUNDLE"):
        core_eval.Bundle(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no core.yaml"):
        core_eval.Bundle(tmp_path)
    (tmp_path / "half.zip").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="half.zip can't be opened"):
        core_eval.Bundle(tmp_path / "half.zip")
    top = write_bundle(tmp_path)
    bundle = core_eval.Bundle(top)
    with pytest.raises(UserError, match="no task nonsense: there are choose, say"):
        core_eval.evaluate(Bigrams({}), Letters(), bundle, tasks=["nonsense"], runtime=RT)
    (top / "eval_data" / "x" / "mc.jsonl").write_text('{"query": "x", "choices": ["a"], "gold": 0}\n{"query": ')
    with pytest.raises(UserError, match="Line 2 of the CORE task choose"):
        core_eval.evaluate(Bigrams({}), Letters(), bundle, runtime=RT)
    (top / "eval_data" / "x" / "mc.jsonl").write_text('{"query": "x"}')
    with pytest.raises(UserError, match="has no choices and no gold"):
        core_eval.evaluate(Bigrams({}), Letters(), bundle, runtime=RT)
    (top / "core.yaml").write_text("icl_tasks: [{label: choose}]")
    with pytest.raises(UserError, match="damaged"):
        bundle.specs()


def test_the_bundle_is_found_given_named_present_or_fetched(tmp_path, base_dir, monkeypatch):
    top = write_bundle(tmp_path)
    assert core_eval.bundle(RT, top).path == top
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(top))
    assert core_eval.bundle(RT).path == top
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE")

    archive = tmp_path / "published.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in top.rglob("*"):
            zipped.write(path, path.relative_to(tmp_path))
    monkeypatch.setattr(core_eval, "BUNDLE_URL", archive.as_uri())
    # the archive is another file than the pinned one
    with pytest.raises(UserError, match="is not the file it was.*NANOCHAT_EVAL_BUNDLE"):
        core_eval.bundle(RT)
    assert not list(base_dir.glob("*.zip")), "a wrong download must not stay (pitfall 10)"
    monkeypatch.setattr(core_eval, "BUNDLE_SHA256", core_eval.paths.sha256(archive))
    assert core_eval.bundle(RT).path == base_dir / "eval_bundle.zip"
    archive.unlink()
    assert core_eval.bundle(RT).specs()  # fetched once

    (base_dir / "eval_bundle.zip").unlink()
    with pytest.raises(UserError, match="can't be fetched.*NANOCHAT_EVAL_BUNDLE"):
        core_eval.bundle(RT)


RANKS = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from nanochat import core_eval, runtime
from test_core_eval import Bigrams, Letters, MODEL
rt = runtime.start("cpu")
found = core_eval.evaluate(Bigrams(MODEL), Letters(), Path({path!r}), max_per_task=13, runtime=rt)
print(f"core {{found['core']:.9f}} {{found['tasks']['choose']['accuracy']:.9f}}\\n", end="")
runtime.stop(rt)
"""


@pytest.mark.slow
def test_any_number_of_ranks_finds_the_same(tmp_path, on_ranks):
    top = write_bundle(tmp_path)
    one = core_eval.evaluate(Bigrams(MODEL), Letters(), top, max_per_task=13, runtime=RT)
    out = on_ranks(3, RANKS.format(path=str(top))).stdout
    assert out.count(f"core {one['core']:.9f} {one['tasks']['choose']['accuracy']:.9f}") == 3, out


# ---- the real bundle -------------------------------------------------------------------------------------------------


SIZES = {
    "hellaswag_zeroshot": (10042, 0), "jeopardy": (2117, 10), "bigbench_qa_wikidata": (20321, 10),
    "arc_easy": (2376, 10), "arc_challenge": (1172, 10), "copa": (100, 0), "commonsense_qa": (1221, 10),
    "piqa": (1838, 10), "openbook_qa": (500, 0), "lambada_openai": (5153, 0), "hellaswag": (10042, 10),
    "winograd": (273, 0), "winogrande": (1267, 0), "bigbench_dyck_languages": (1000, 10), "agi_eval_lsat_ar": (230, 3),
    "bigbench_cs_algorithms": (1320, 10), "bigbench_operators": (210, 10), "bigbench_repeat_copy_logic": (32, 10),
    "squad": (10570, 10), "coqa": (7983, 0), "boolq": (3270, 10), "bigbench_language_identification": (10000, 10),
}  # fmt: skip


@pytest.mark.slow
def test_the_real_bundle_has_all_22_tasks_whole(shared_data):
    bundle = core_eval.Bundle(shared_data / "eval_bundle.zip")
    specs = bundle.specs()
    assert {spec.label: (len(bundle.items(spec)), spec.shots) for spec in specs} == SIZES
    baselines = {spec.label: spec.baseline for spec in specs}
    assert baselines["boolq"] == 0.62 and baselines["bigbench_language_identification"] == pytest.approx(0.091)
    delimiters = {spec.label for spec in specs if spec.delimiter == "\nAnswer: "}
    assert delimiters == {"jeopardy", "arc_easy", "arc_challenge", "piqa", "boolq"}


@pytest.mark.slow
def test_a_random_model_is_at_chance_on_real_tasks(shared_data, gpt):
    bundle = core_eval.Bundle(shared_data / "eval_bundle.zip")

    class Bytes(Letters):
        def encode(self, texts, prepend=None):
            return [[prepend, *(byte % 127 + 1 for byte in text.encode())] for text in texts]

    tasks = ["copa", "winograd", "lambada_openai", "openbook_qa"]
    results = core_eval.evaluate(gpt, Bytes(), bundle, tasks=tasks, max_per_task=60, runtime=RT)
    for label, one in results["tasks"].items():
        assert abs(one["accuracy"] - one["baseline"]) <= 4 * math.sqrt(0.25 / one["n"]), (label, one)
