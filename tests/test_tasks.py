"""The tasks: rows from a folder or a sentence, numbers scored as numbers, one's own files checked."""

import json
import random
import re

import pyarrow
import pyarrow.parquet
import pytest

from nanochat import chat, execution, paths
from nanochat.errors import UserError
from nanochat.tools import calculator
from tasks import common, customjson, gsm8k, humaneval, mixtures, source, spellingbee, suite
from tasks.arc import ARC
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

ARC_ROW = {"question": "Hot?", "choices": {"text": ["sun", "ice"], "label": ["A", "B"]}, "answerKey": "A"}
MMLU_ROW = {"question": "1+1", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 1}
GSM_ROW = {"question": "How many?", "answer": "2 x 3 = <<2*3=6>>6 and 6+1,000 = <<6+1000=1006>>1006\n#### 1,006"}
CODE_ROW = {
    "prompt": 'from typing import List\n\ndef half(x):\n    return x / 2\n\ndef double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return x * 2\n",
    "test": "def check(candidate):\n    assert candidate(half(4)) == 4\n",
    "entry_point": "double",
}
TALK_ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "data"
    write(top / "arc" / "ARC-Easy_test.parquet", [ARC_ROW | {"question": f"Hot {i}?"} for i in range(5)])
    write(top / "mmlu" / "test.parquet", [MMLU_ROW] * 3)
    write(top / "gsm8k" / "test.parquet", [GSM_ROW] * 2)
    write(top / "humaneval" / "test.parquet", [CODE_ROW])
    write(top / "chat" / "train.parquet", [TALK_ROW] * 4)
    (top / "words_alpha.txt").write_text("strawberry\nplum\nX-ray\n\nfig\n")
    return top


# ---- where rows come from --------------------------------------------------------------------------------------------


def test_rows_come_shuffled_the_same_way_every_time(folder):
    first, again = ARC("ARC-Easy", "test", folder), ARC("ARC-Easy", "test", folder)
    order = [example["messages"][0]["content"] for example in first]
    assert order == [example["messages"][0]["content"] for example in again] and len(set(order)) == 5
    assert order != sorted(order)


def test_the_folder_is_taken_from_the_environment_too(folder, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TASKS_DIR", str(folder))
    assert len(MMLU("test")) == 3 and len(MMLU("test", stop=2)) == 2 and len(MMLU("test", stop=99)) == 3


def test_the_diet_of_a_model_of_real_text_has_each_part_as_often_as_asked(folder, tmp_path, monkeypatch):
    """What is asked for no time is not read: the folder has no auxiliary questions until the second half."""
    monkeypatch.setenv("NANOCHAT_TASKS_DIR", str(folder))
    write(folder / "chat" / "test.parquet", [TALK_ROW] * 2)
    write(folder / "gsm8k" / "train.parquet", [GSM_ROW] * 3)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(TALK_ROW["messages"]) + "\n")
    spelling = 200_000 + 80_000
    train, held_out = mixtures.sft("climbmix", mmlu_epochs=0, gsm8k_epochs=2, identity=str(own))
    assert len(train) == 4 + 2 * 3 + spelling + 2 and len(held_out) == 2 + 3 + 2
    with pytest.raises(UserError, match="auxiliary_train.parquet does not exist"):
        mixtures.sft("climbmix")
    write(folder / "mmlu" / "auxiliary_train.parquet", [MMLU_ROW] * 5)
    assert len(mixtures.sft("climbmix")[0]) == 4 + 3 * 5 + 4 * 3 + spelling
    assert list(map(len, mixtures.rl("climbmix"))) == [3, 2] and len(mixtures.rl("tinyworld")[1]) == 400


def test_what_is_missing_or_wrong_in_the_folder_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="auxiliary_train.parquet does not exist.*unset NANOCHAT_TASKS_DIR"):
        MMLU("auxiliary_train", folder)
    with pytest.raises(UserError, match="nowhere, does not exist: mend NANOCHAT_TASKS_DIR"):
        MMLU("test", tmp_path / "nowhere")
    (folder / "gsm8k" / "test.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="can't be read as parquet"):
        GSM8K("main", "test", folder)
    write(folder / "mmlu" / "test.parquet", [{"question": "?"}])
    with pytest.raises(UserError, match="lacks the columns subject, choices, answer"):
        MMLU("test", folder)


@pytest.mark.parametrize(
    "make",
    [lambda: ARC("ARC-Hard", "test"), lambda: MMLU("train"), lambda: GSM8K("main", "dev"), lambda: SmolTalk("val"),
     lambda: HumanEval("train"), lambda: SpellingBee("dev"), lambda: SpellingBee(size=0), lambda: suite.make("GSM9K")],
)  # fmt: skip
def test_an_unknown_subset_split_size_or_name_is_refused(make):
    with pytest.raises(UserError):
        make()


def test_offline_and_without_a_folder_one_sentence_names_the_remedy(monkeypatch):
    import datasets

    monkeypatch.delenv("NANOCHAT_TASKS_DIR", raising=False)
    asked = {}

    def offline(repo, subset, **more):
        asked.update(more, repo=repo, subset=subset)
        raise ConnectionError("no network here\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"openai/gsm8k can't be read from the hub \(no network here\).*--tasks-dir"):
        GSM8K("main", "test")
    assert asked["repo"] == "openai/gsm8k" and asked["split"] == "test"
    assert re.fullmatch("[0-9a-f]{40}", asked["revision"])  # pinned (pitfall 52)


def test_the_hubs_table_is_used_as_it_comes(monkeypatch):
    import datasets

    monkeypatch.delenv("NANOCHAT_TASKS_DIR", raising=False)
    rows = datasets.Dataset.from_list([MMLU_ROW | {"extra": 1}] * 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert MMLU("test")[1]["subject"] == "maths"


def test_the_order_is_that_of_the_datasets_library(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"i": list(range(50))})
    ours = source.Rows(rows.data.table)
    assert [ours[i]["i"] for i in range(50)] == rows.shuffle(seed=42)["i"][:]


# ---- multiple choice -------------------------------------------------------------------------------------------------


def test_multiple_choice_examples_say_their_letters_and_know_the_right_one(folder):
    example = ARC("ARC-Easy", "test", folder)[0]
    assert example["letters"] == ["A", "B"] and "- sun=A\n- ice=B\n" in example["messages"][0]["content"]
    for task, right, wrong in ((ARC("ARC-Easy", "test", folder), "A", "B"), (MMLU("test", folder), "B", "C")):
        assert task.eval_type == "categorical" and task.baseline == 0.25
        assert task.evaluate(task[0], right) and not task.evaluate(task[0], wrong)
        chat.check(task[0])


# ---- GSM8K -----------------------------------------------------------------------------------------------------------


def test_annotations_become_tool_calls_that_the_calculator_agrees_with(folder):
    example = GSM8K("main", "test", folder)[0]
    parts = example["messages"][1]["content"]
    assert common.tool_calls(parts) == [("2*3", "6"), ("6+1000", "1006")]
    assert common.text_of(parts) == "2 x 3 = 6 and 6+1,000 = 1006\n#### 1,006"
    assert all(calculator(call) == output for call, output in common.tool_calls(parts))
    chat.check(example)


@pytest.mark.parametrize(
    "text",
    ["#### 1006", "####1006", "#### 1,006", "#### 1006.", "#### 1006.00", "#### $1006", "####  $1,006.0 dollars",
     "so\n#### 1006\nbye", "#### +1006", "#### 1006%", "#### 1006\n#### 7"],
)  # fmt: skip
def test_a_right_number_is_right_however_it_is_written_pitfall_39(folder, text):
    task = GSM8K("main", "test", folder)
    assert task.evaluate(task[0], text) and task.reward(task[0], text) == 1.0


@pytest.mark.parametrize(
    "text", ["1006", "#### 1007", "#### -1006", "#### 10,06.5", "#### 1006/2", "#### 1006:30", "####", "#### one", ""]
)
def test_a_wrong_or_missing_number_is_wrong(folder, text):
    task = GSM8K("main", "test", folder)
    assert not task.evaluate(task[0], text) and task.reward(task[0], text) == 0.0


def test_signs_and_decimals_are_read():
    assert gsm8k.final_number("#### -3.50") == -3.5 and gsm8k.final_number("#### -$2") == -2
    assert gsm8k.final_number("#### $-2") == -2 and gsm8k.final_number("#### \u22127") == -7
    assert gsm8k.final_number("#### .5") == 0.5 and gsm8k.final_number("#### 3/4") is None


def test_a_tool_output_is_not_mistaken_for_the_answer(folder):
    task = GSM8K("main", "test", folder)
    reply = [{"type": "python_output", "text": "#### 1006"}, {"type": "text", "text": "#### 5"}]
    assert not task.evaluate(task[0], reply)


# ---- HumanEval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("def double(x):\n    return x + x", True),
        ("Sure!\n```python\ndef double(x):\n    return half(x) * 4\n```\nDone.", True),  # the prompt's helper is there
        ("```\nfrom math import *\ndef double(x):\n    return x * 2", True),  # the fence was never closed
        ("    return x * 2", True),  # the body alone
        ("def double(x):\n    return x", False),
        ("I can't.", False),
        ("import sys\nsys.exit(0)", False),
        ("", False),
    ],
)
def test_code_is_judged_by_the_hidden_tests(folder, reply, right):
    if execution._isolation()[0] == "none":
        pytest.skip("no isolation on this machine")
    task = HumanEval(folder=folder)
    assert task.evaluate(task[0], reply) is right
    assert task.evaluate(task[0], [{"type": "text", "text": reply}]) is right


def test_where_code_cannot_be_isolated_the_task_says_so_at_once(folder, monkeypatch):
    monkeypatch.setattr(execution, "_isolation", lambda: ("none", ["not here"]))
    with pytest.raises(UserError, match="can't isolate"):
        HumanEval(folder=folder)
    assert len(HumanEval(folder=folder, allow_unsafe=True)) == 1


def test_the_first_fenced_block_is_the_code():
    assert humaneval.code_of("a\n```py\none\n```\n```\ntwo\n```") == "one"
    assert humaneval.code_of("no fence") == "no fence"


# ---- spelling --------------------------------------------------------------------------------------------------------


def test_spelling_examples_are_true_and_agree_with_the_tool(folder):
    task = SpellingBee("train", 200, folder)
    for example in task:
        question, parts = example["messages"][0]["content"], example["messages"][1]["content"]
        ((call, output),) = common.tool_calls(parts)
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call).groups()
        assert calculator(call) == output == str(word.count(letter))
        assert word in question and letter in question
        text = common.text_of(parts)
        assert ",".join(word) in text and text.endswith(f"#### {output}")
        assert task.evaluate(example, text) and not task.evaluate(example, "#### 99")


def test_the_questions_vary_and_the_splits_differ(folder):
    train = [e["messages"][0]["content"] for e in SpellingBee("train", 300, folder)]
    test = [e["messages"][0]["content"] for e in SpellingBee("test", 300, folder)]
    assert train == [e["messages"][0]["content"] for e in SpellingBee("train", 300, folder)] != test
    ended = sum(question.endswith("?") for question in train)
    assert 100 < ended < 200 and len(spellingbee.TEMPLATES) > 40
    for template in spellingbee.TEMPLATES:
        assert "{word}" in template and "{letter}" in template and template.lower().format(word="w", letter="l")


def test_simple_spelling_spells(folder):
    task = SimpleSpelling("train", 5, folder)
    word, _, letters = task[0]["messages"][1]["content"].partition(":")
    assert letters == ",".join(word) and task[0]["messages"][0]["content"].endswith(word)
    assert task.evaluate(task[0], f"{word}:{letters}\n") and not task.evaluate(task[0], word)


def test_the_words_are_the_folders_else_fetched_else_tinyworlds(folder, base_dir, monkeypatch, caplog):
    monkeypatch.delenv("NANOCHAT_TASKS_DIR", raising=False)
    spellingbee._words.cache_clear()
    words, came_from = spellingbee.word_list(folder)
    assert words == ("fig", "plum", "strawberry") and came_from == str(folder / "words_alpha.txt")
    words, came_from = spellingbee.word_list()  # the tests are offline
    assert came_from == "tinyworld" and len(words) > 500 and "spelling tinyworld's words" in caplog.text
    spellingbee._words.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(spellingbee, "WORDS_URL", (folder / "words_alpha.txt").as_uri())
    words, came_from = spellingbee.word_list()
    assert words == ("fig", "plum", "strawberry") and came_from == str(base_dir / "words_alpha.txt")
    spellingbee._words.cache_clear()


# ---- own conversations -----------------------------------------------------------------------------------------------


GOOD = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Ada.\u2028 Yes."}]


def test_a_file_of_conversations_is_read_in_both_forms(tmp_path):
    path = tmp_path / "identity.jsonl"
    lines = [json.dumps(GOOD, ensure_ascii=False), "", json.dumps({"messages": GOOD, "id": 3})]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = CustomJSON(path)
    assert len(task) == 2 and task[0] == task[1] == {"messages": GOOD}
    assert len(CustomJSON(path, stop=1)) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("not json", "it is not JSON"),
        ("[]", "at least one message"),
        ('"text"', "at least one message"),
        (json.dumps(GOOD[::-1]), "message 1 has the role 'assistant'"),
        (json.dumps([GOOD[0], {"role": "assistant", "content": 5}]), "message 2 has a content"),
        (json.dumps(GOOD[:1]), "no answer to learn from"),
    ],
)
def test_a_line_that_is_no_conversation_is_named_with_its_number_pitfall_53(tmp_path, line, sentence):
    path = tmp_path / "identity.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError, match=f"Line 3 of .*identity.jsonl is not a conversation: .*{sentence}"):
        CustomJSON(path)


def test_a_missing_or_empty_file_is_a_sentence_and_never_zero_rows_pitfall_53(tmp_path):
    with pytest.raises(UserError, match="can't be read .No such file"):
        CustomJSON(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no conversation"):
        customjson.read(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'["\xe9"]')
    with pytest.raises(UserError, match="not UTF-8"):
        CustomJSON(tmp_path / "latin.jsonl")


# ---- suites and downloads --------------------------------------------------------------------------------------------


def test_the_suite_follows_the_corpus(folder, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TASKS_DIR", str(folder))
    assert suite.names("climbmix") == suite.PUBLISHED and suite.names("tinyworld") == suite.TINYWORLD
    assert {name: suite.make(name).eval_type for name in suite.TINYWORLD} == {
        "facts": "generative", "choice": "categorical", "sums": "generative",
    }  # fmt: skip
    assert len(suite.make("MMLU")) == 3 and len(suite.make("SpellingBee")) == 256


def test_a_file_is_fetched_once_and_whole_pitfall_10(tmp_path):
    origin, target = tmp_path / "origin", tmp_path / "kept" / "file"
    origin.write_bytes(b"whole")
    with pytest.raises(UserError, match="not the file it was"):
        paths.fetch(origin.as_uri(), target, "0" * 64)
    assert not target.exists() and not [p for p in target.parent.iterdir() if p.name.startswith(".tmp")]
    assert paths.fetch(origin.as_uri(), target, paths.sha256(origin)).read_bytes() == b"whole"
    origin.write_bytes(b"changed")
    assert paths.fetch(origin.as_uri(), target).read_bytes() == b"whole"
    with pytest.raises(UserError, match="can't be fetched"):
        paths.fetch((tmp_path / "nowhere").as_uri(), tmp_path / "other")


def test_a_file_is_fetched_under_a_bar_that_ends_full_pitfall_51(tmp_path, monkeypatch, capsys):
    (tmp_path / "origin").write_bytes(bytes(3 << 20))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    paths.fetch((tmp_path / "origin").as_uri(), tmp_path / "bundle.zip")
    assert "bundle.zip: 100%" in capsys.readouterr().err


# ---- the real data ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_data_gives_conversations_whose_own_answers_are_right(shared_data):
    folder = shared_data / "tasks"
    tasks = [
        (ARC("ARC-Easy", "test", folder), 2376), (ARC("ARC-Challenge", "test", folder), 1172),
        (MMLU("test", folder), 14042), (GSM8K("main", "test", folder), 1319), (GSM8K("main", "train", folder), 7473),
        (SmolTalk("train", folder), 27051), (HumanEval(folder=folder), 164), (SpellingBee("test", 256, folder), 256),
    ]  # fmt: skip
    for task, size in tasks:
        assert len(task) == size
        for i in random.Random(0).sample(range(size), min(size, 300)):
            example = task[i]
            chat.check(example)
            if not isinstance(task, SmolTalk | HumanEval):
                assert task.evaluate(example, common.reference_of(example)), example
