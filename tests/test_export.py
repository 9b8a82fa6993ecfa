"""Exports compute what we compute, encode as we encode, and come back bit for bit."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import TOKENIZER, save_checkpoint, tiny_gpt

from nanochat import chat, checkpoint, paths, record
from nanochat.errors import UserError
from nanochat.export import gguf_file, graph, hub, parity, tokenizer_json
from nanochat.tokenizer import Tokenizer
from scripts import bench_export, bench_lm_eval, export

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own warnings
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 7*8?\n"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "python", "text": "7*8"},
                                      {"type": "python_output", "text": "56"}, {"type": "text", "text": "56."}]},
    {"role": "user", "content": "Thanks, naïve 😀 friend"},
]  # fmt: skip


@pytest.fixture
def folder(base_dir, tmp_path, monkeypatch):
    """An exported tiny model; the modelling file is copied by transformers into a private place."""
    pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    save_checkpoint("sft")
    log = record.Record(base_dir / "chatsft_checkpoints" / "d3" / "record.jsonl", stage="sft", config={})
    log.eval(5, val_bpb=1.25)
    log.close(seconds=60.0)
    out = tmp_path / "out"
    assert export.main(export.Config(output=str(out), check=False))["path"] == str(out)
    return out


def continued(model, rows, count, **options):
    """The `count` new ids of each row, greedy unless told otherwise, with no end."""
    options = {"attention_mask": torch.ones_like(rows), **options}
    out = model.generate(rows, max_new_tokens=count, do_sample=False, eos_token_id=None, **options)
    return out[:, rows.size(1) :].tolist()


def ours():
    return checkpoint.build_model("sft")[0]


@pytest.mark.slow
def test_transformers_loads_the_folder_and_agrees_in_every_logit_and_token(folder):
    theirs, model = parity.load_hf(folder), ours()
    assert parity.difference("hf", folder, model, torch.Generator().manual_seed(1)) < 1e-5
    prompt = TOKENIZER.encode("Ab", prepend="<|bos|>")
    expected = list(model.generate_naive(prompt, 40, temperature=0))
    assert continued(theirs, torch.tensor([prompt]), 40)[0] == expected
    with pytest.raises(ValueError, match="context of 64"):
        theirs(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.slow
def test_padded_rows_and_chunks_behind_a_cache_mean_the_same_in_transformers(folder):
    """Left padding, as batched generation and lm-eval use it, and feeding a row in pieces."""
    theirs = parity.load_hf(folder)
    short, long = TOKENIZER.encode("xyz", prepend="<|bos|>"), TOKENIZER.encode("hello you there", prepend="<|bos|>")
    pad = len(long) - len(short)
    rows, mask = torch.tensor([[TOKENIZER.bos] * pad + short, long]), torch.ones(2, len(long), dtype=torch.int64)
    mask[0, :pad] = 0
    with torch.no_grad():
        alone = theirs(torch.tensor([short])).logits[0]
        both = theirs(rows, attention_mask=mask).logits
        assert (both[0, pad:] - alone).abs().max() < 1e-5 and both.isfinite().all()
        first = theirs(torch.tensor([long[:7]]), use_cache=True)
        cache = getattr(first, "cache", None) or first.past_key_values
        rest = theirs(torch.tensor([long[7:]]), cache=cache).logits[0]
        assert (rest - both[1, 7:]).abs().max() < 1e-5
    expected = [list(ours().generate_naive(row, 20, temperature=0)) for row in (short, long)]
    assert continued(theirs, rows, 20, attention_mask=mask) == expected
    best = continued(theirs, rows[:1, pad:], 12, num_beams=3)[0]  # beams change places: smear must follow them
    score = lambda new: theirs(torch.tensor([short + new])).logits[0].log_softmax(-1)[len(short) - 1 :]
    likely = lambda new: sum(float(row[t]) for row, t in zip(score(new), new))
    assert likely(best) >= likely(expected[0][:12])


def test_the_chat_template_gives_the_ids_of_our_own_rendering(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    apply = lambda messages, **options: theirs.apply_chat_template(
        messages, tokenize=True, return_dict=False, **options
    )
    expected = chat.render_for_completion({"messages": CONVERSATION}, TOKENIZER)
    assert apply(CONVERSATION, add_generation_prompt=True) == expected
    ids, _ = chat.render({"messages": CONVERSATION[1:3]}, TOKENIZER)
    assert apply(CONVERSATION[1:3]) == ids


def texts(count=300):
    """Random strings over letters, digits, blanks, signs, scripts and emoji, with runs and apostrophes."""
    pieces = ["the ", "don't", "I'LL", " 1234567", "\n\n", "  \t", "é", "ß", "ſ", "你好", "🙂👍🏽", "’s", "--", "x" * 9,
              "\u00a0", "\r\n", "٣٤", "a'S", "\u200b", "\u0085", "Ⅻ", "²"]  # fmt: skip
    dice = random.Random(0)
    return ["".join(dice.choices(pieces, k=dice.randint(0, 30))) for _ in range(count)]


def test_the_tokenizer_gives_the_same_ids_and_comes_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer.train(texts(60) + ["the quick brown fox jumps over the lazy dog " * 9], 330)
    content = tokenizer_json.tokenizer_json(ours)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in texts():
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.encode(text).ids == [ours.bos, *ids]
        assert theirs.decode(ids) == text
    assert [theirs.token_to_id(name) for name in ours.specials] == list(ours.specials.values())
    assert tokenizer_json.ranks_of(content) == ours.ranks
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    with pytest.raises(UserError, match="pattern"):
        tokenizer_json.ranks_of(content)


def test_an_exported_model_comes_back_bit_for_bit(folder, tmp_path, monkeypatch):
    before = checkpoint.load(checkpoint.find("sft")).weights()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    out = export.main(export.Config(import_from=str(folder), model_tag="back"))
    model, tokenizer, meta = checkpoint.build_model("sft", "back")
    assert tokenizer.fingerprint == TOKENIZER.fingerprint and meta["step"] == 5 and meta["imported_from"] == "out"
    after = checkpoint.load(checkpoint.find("sft", "back")).weights()
    assert before.keys() == after.keys() and all(before[n].equal(after[n]) for n in before)
    with pytest.raises(UserError, match="--model-tag"):
        hub.read(folder, tag="back")
    Tokenizer.from_ranks([bytes([i]) for i in reversed(range(256))]).save()
    with pytest.raises(UserError, match="another tokenizer"):
        hub.read(folder, tag="more")
    with pytest.raises(UserError, match="not a plain name"):
        hub.read(folder, tag="../elsewhere")
    assert out["path"].endswith("back/step_000005")


def test_the_card_says_what_the_record_says_and_nothing_else_is_overwritten(folder, tmp_path):
    text = (folder / "README.md").read_text()
    assert "| val_bpb | 1.2500 |" in text and "| sft | 1.0 |" in text and "library_name: transformers" in text
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export.main(export.Config(output=str(mine), check=False))
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


@pytest.mark.slow  # torch.export
def test_a_wrong_export_is_found_by_the_check(base_dir, tmp_path):
    model = tiny_gpt()
    path = graph.write_torch(tmp_path / "m.pt2", model)
    assert parity.difference("torch", path, model, torch.Generator().manual_seed(0)) < 1e-5
    with torch.no_grad():
        model.smear_lambda.add_(0.05)
    with pytest.raises(UserError, match="other logits"):
        parity.difference("torch", path, model, torch.Generator().manual_seed(0))


@pytest.mark.slow  # the ONNX converter
def test_the_onnx_graph_agrees_for_other_sizes_than_it_was_traced_with(base_dir):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_checkpoint("base")
    out = export.main(export.Config(source="base", format="onnx"))
    assert out["difference"] < 1e-4 and out["path"].endswith("exports/d3_base.onnx")
    model = checkpoint.build_model("base")[0]
    session = onnxruntime.InferenceSession(out["path"], providers=["CPUExecutionProvider"])
    for rows, length in ((1, 64), (3, 5)):
        ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))
        (logits,) = session.run(None, {"ids": ids.numpy()})
        assert (torch.from_numpy(logits) - model(ids)).abs().max() < 1e-4


def test_the_gguf_file_holds_the_whole_model_and_says_that_llama_cpp_has_no_such_architecture(base_dir, capsys):
    gguf = pytest.importorskip("gguf")
    save_checkpoint("base")
    out = export.main(export.Config(source="base", format="gguf"))
    assert out["difference"] == 0.0 and "llama.cpp has no architecture with smear" in capsys.readouterr().out
    reader = gguf.GGUFReader(out["path"])
    field = lambda name: reader.fields[name].contents()
    assert field("general.architecture") == gguf_file.ARCHITECTURE and field("nanochat-gpt.block_count") == 3
    assert field("tokenizer.ggml.bos_token_id") == TOKENIZER.bos
    assert len(field("tokenizer.ggml.tokens")) == TOKENIZER.vocab_size
    assert gguf_file.ARCHITECTURE not in gguf.MODEL_ARCH_NAMES.values(), "llama.cpp can run it now: write its tensors"


def test_pushing_needs_a_token_and_uploads_the_folder(folder, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, name, private, exist_ok):
            calls.append(("create", name, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="HF_TOKEN"):
        hub.push(folder, "me/model")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError, match="USER/NAME"):
        hub.push(folder, "model")
    assert hub.push(folder, "me/model").endswith("/me/model")
    assert calls == [("token", "secret"), ("create", "me/model", True), ("upload", "me/model", str(folder))]


def test_flags_that_make_no_sense_are_refused_at_once():
    with pytest.raises(UserError, match="2 things"):
        export.main(export.Config(format="pickle", push="a/b"))


def test_the_exported_classes_are_those_of_the_modelling_file(folder):
    from nanochat.export import modeling_nanochat_gpt as modeling

    classes = paths.read_json(folder / "config.json")["auto_map"].values()
    assert classes and all(hasattr(modeling, name.partition(".")[2]) for name in classes)


def test_the_bench_finds_the_first_token_and_the_first_text_that_differ(folder):
    tokenizers = pytest.importorskip("tokenizers")
    theirs, model = parity.load_hf(folder), ours()
    rows = bench_export.prompts(TOKENIZER)[:2]
    assert bench_export.greedy(model, theirs, rows, 10)["equal"] == 2
    with torch.no_grad():
        theirs.lm_head.weight.mul_(-1)
    assert bench_export.greedy(model, theirs, rows, 10) == {
        "prompts": 2, "equal": 0, "tokens": 20, "shortest_agreement": 0}  # fmt: skip
    content = tokenizer_json.tokenizer_json(TOKENIZER)
    content["model"]["vocab"]["A"], content["model"]["vocab"]["B"] = 66, 65
    wrong = tokenizers.Tokenizer.from_str(json.dumps(content))
    found = bench_export.same_ids(TOKENIZER, wrong, ["abc", "aAc"])
    assert (found["texts"], found["different"], found["first"]) == (2, 1, ["'aAc'"])


@pytest.fixture
def long_folder(base_dir, tmp_path, monkeypatch):
    """An exported tiny model whose context holds the questions of benchmarks, a byte a token."""
    pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    save_checkpoint("sft", sequence_len=512)
    return Path(export.main(export.Config(output=str(tmp_path / "long"), check=False))["path"])


@pytest.mark.slow  # lm-eval's imports
def test_the_harness_and_our_own_evaluations_agree_item_by_item(long_folder, shared_data, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    cfg = bench_lm_eval.Config(model=str(long_folder), data=str(shared_data), limit=6, output=str(tmp_path / "out"))
    said, harness = [], bench_lm_eval.harness
    monkeypatch.setattr(bench_lm_eval, "harness", lambda *arguments: said.append(harness(*arguments)) or said[-1])
    found = bench_lm_eval.main(cfg)["tasks"]
    assert set(found) == {"copa", "winograd", "lambada_openai", "arc_easy", "gsm8k"}
    for one in found.values():
        assert one["items"] >= 3 and one["different"] == [] and one["harness"] == one["nanochat"]
        assert one["largest_score_difference"] < 1e-4 and len(one["right_by_harness"]) == one["items"]
    assert json.loads((tmp_path / "out").read_text())["tasks"] == found
    other, tokenizer = hub.model_of(long_folder)  # a model that is a little off is found
    monkeypatch.setattr(bench_lm_eval, "harness", lambda *_: said.pop(0))
    with torch.no_grad():
        other.smear_lambda.add_(0.05)
    monkeypatch.setattr(hub, "model_of", lambda folder: (other, tokenizer))
    assert all(one["different"] for one in bench_lm_eval.main(cfg)["tasks"].values())


def test_the_harness_bench_wants_an_exported_folder_and_counts_what_differs(tmp_path):
    with pytest.raises(UserError, match="scripts.export"):
        bench_lm_eval.main(bench_lm_eval.Config(model=str(tmp_path)))
    item = bench_lm_eval.Item
    theirs = [item(True, [-3.0, -4.0]), item(False, [-1.0, -1.0]), item(True, text="a"), item(True, [-2.0])]
    ours = [item(True, [-1.0, -2.0]), item(True, [-1.0, -2.0]), item(True, text="b"), item(True, same=False)]
    found = bench_lm_eval.compare(theirs, ours)
    # the first has the same scores but for what its choices share; the last is not the same to both
    assert (found["items"], found["left_out"], found["different"]) == (3, 1, [1, 2])
    assert found["harness"] == pytest.approx(2 / 3) and found["nanochat"] == 1.0
    assert found["largest_score_difference"] == 1.0 and found["right_by_harness"] == "101"


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_disk_too_small_is_a_sentence_before_anything_is_written(base_dir, tmp_path, monkeypatch, kind):
    save_checkpoint("sft")
    monkeypatch.setattr(paths, "free_bytes", lambda path: 1000)
    target = tmp_path / "far" / "away" / "out"
    with pytest.raises(UserError, match="takes about .* MB and its disk has 0 MB free: free some space"):
        export.main(export.Config(output=str(target), format=kind))
    assert not (tmp_path / "far").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: [content], "has format None"),
        (lambda content: content | {"format": 99}, "has format 99"),
        (lambda content: content | {"meta": None}, "is damaged"),
        (lambda content: content | {"meta": content["meta"] | {"step": "../../5"}}, "is damaged"),
        (lambda content: content | {"meta": content["meta"] | {"config": {"layers": 3}}}, "no model of ours"),
        (lambda content: content | {"meta": content["meta"] | {"stage": "../../up"}}, "is unknown"),
    ],
)
def test_a_folder_from_a_stranger_is_read_with_care(folder, tmp_path, monkeypatch, change, says):
    """It says where it goes, so it might say anywhere."""
    shutil.copytree(folder, tmp_path / "theirs")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    path = tmp_path / "theirs" / "nanochat.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=says):
        hub.read(tmp_path / "theirs")


def test_an_imported_model_is_named_by_its_folder_and_by_nothing_inside_it(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "theirs")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    path = tmp_path / "theirs" / "nanochat.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"meta": content["meta"] | {"tag": "../../../elsewhere"}}))
    monkeypatch.chdir(tmp_path / "theirs")
    assert hub.read(".") == tmp_path / "base" / "chatsft_checkpoints" / "theirs" / "step_000005"
