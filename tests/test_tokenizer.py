"""nanochat/tokenizer.py: lossless, deterministic, injection-proof, and refused when its file is not whole."""

import json
import threading
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import tokenizer as module
from nanochat.errors import UserError
from nanochat.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, _spell, _unspell

TEXTS = [
    "the cat sat on the mat, and the cat's hat sat on the cat; 1234 and 5678 hats\n" * 3,
    'def f(x):\n    return "\\n" * x  # naïve café 안녕하세요 你好\n' * 2,
    "the theory of the thing is that the thing thinks; therefore they then went there\n",
]
REMEDY = r"python -m scripts\.tok_train"


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(TEXTS, 330, {"dataset": {"dataset": "words"}})


# -- ids --------------------------------------------------------------------------------------------------------------


def test_nine_specials_follow_the_ranks(tok):
    assert tok.vocab_size == 330
    assert [tok.special(name) for name in SPECIAL_TOKENS] == list(range(321, 330))
    assert tok.bos == 321
    assert [i for i in range(330) if tok.is_special(i)] == list(range(321, 330))
    assert len(tok.ranks) == 321 and tok.ranks[:256] == [bytes([b]) for b in range(256)]


def test_the_first_merge_is_the_most_frequent_pair():
    assert Tokenizer.train(["ab" * 30 + " bc bc"], 266).ranks[256] == b"ab"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()


def educational(text, ranks):
    """The slow twin: split by the pattern, then merge the lowest-ranked neighbours until none is left."""
    rank = {token: i for i, token in enumerate(ranks)}
    ids = []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            pairs = [(rank.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            best, i = min(pairs, default=(1 << 30, 0))
            if best == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("thecatson '12,\n\téé好#")))
def test_encode_equals_the_slow_twin(tok, text):
    assert tok.encode(text) == educational(text, tok.ranks)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_strings_in_text_never_become_special_ids(tok, name):
    for ids in (tok.encode(f"a{name}b"), *tok.encode([name, f"{name}\n"])):
        assert not any(map(tok.is_special, ids))
    assert tok.decode(tok.encode(name)) == name


def test_numbers_are_cut_into_at_most_two_digits():
    tokenizer = Tokenizer.train(["123 1234 12345 " * 50, "1212 " * 500], 267)
    assert all(len(token) <= 2 for token in tokenizer.ranks if token.strip().isdigit())
    assert tokenizer.encode("1212") == [tokenizer.ranks.index(b"12")] * 2


def test_a_list_is_its_texts_in_any_number_of_threads(tok):
    texts = [f"the cat {i} sat" * (i % 7) for i in range(200)]
    single = [tok.encode(text) for text in texts]
    for threads in (1, 2, 8):
        assert tok.encode(texts, threads=threads) == single
    assert tok.encode([]) == []


def test_prepend_and_append_take_an_id_or_a_name(tok):
    plain = tok.encode("the cat")
    assert tok.encode("the cat", prepend=tok.bos, append="<|user_end|>") == [tok.bos, *plain, 323]
    assert tok.encode(["the cat", ""], prepend="<|bos|>") == [[tok.bos, *plain], [tok.bos]]
    with pytest.raises(UserError, match=r"no special token <\|frob\|>"):
        tok.encode("x", append="<|frob|>")


def test_lone_surrogates_become_the_replacement_character(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"


def test_half_a_character_decodes_to_a_mark_and_its_bytes(tok):
    ids = [tok.ranks.index(bytes([b])) for b in "好".encode()]
    assert tok.decode(ids) == "好"
    assert tok.decode(ids[:2]) == "\ufffd"
    assert tok.decode_bytes(ids[:2]) == "好".encode()[:2]
    with pytest.raises(KeyError):
        tok.decode([tok.vocab_size])


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", " \u3000"])
def test_a_million_blanks_do_not_abort_the_process(tok, blank):
    """tiktoken alone aborts here with a Rust panic that `except Exception` does not catch."""
    text = "the" + blank * (1_200_000 // len(blank)) + "cat"
    assert tok.decode(tok.encode(text)) == text


def test_training_on_a_million_blanks_works():
    assert Tokenizer.train([" " * 1_200_000, *TEXTS], 280).vocab_size == 280


def test_token_bytes_are_byte_lengths_and_nought_for_specials(tok):
    sizes = tok.token_bytes()
    assert sizes.shape == (tok.vocab_size,) and sizes.dtype.is_signed
    assert sizes[-9:].tolist() == [0] * 9
    text = "the cat's naïve 好 1234"
    assert sizes[tok.encode(text, prepend=tok.bos)].sum() == len(text.encode())


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_is_deterministic_to_the_byte(tmp_path):
    files = [Tokenizer.train(iter(TEXTS), 320, {"a": 1}).save(tmp_path / str(i)).read_bytes() for i in range(3)]
    assert files[0] == files[1] == files[2]


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="--vocab-size=264 is too small.* 265 or more"):
        Tokenizer.train(TEXTS, 264)
    assert Tokenizer.train(TEXTS, 265).vocab_size == 265


def test_too_little_text_for_the_vocabulary_is_refused_with_the_largest_that_works():
    with pytest.raises(UserError, match="--vocab-size=270 or less"):
        Tokenizer.train(["hello hello"], 5000)
    assert Tokenizer.train(["hello hello"], 270).vocab_size == 270


# -- the file ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_are_the_same(tok, tmp_path, base_dir):
    for folder in (None, tmp_path / "tok"):
        path = tok.save(folder)
        again = Tokenizer.load(folder)
        assert again.fingerprint == tok.fingerprint and again.ranks == tok.ranks and again.meta == tok.meta
        assert again.encode(TEXTS) == tok.encode(TEXTS)
    assert (base_dir / "tokenizer" / "tokenizer.json").read_bytes() == path.read_bytes()


def test_the_file_is_readable_json_not_pickle_pitfall_45(tok, tmp_path):
    content = json.loads(tok.save(tmp_path).read_text())
    assert content["ranks"][255] == r"\xff" and content["ranks"][92] == r"\\" and " the" in content["ranks"]
    assert content["specials"]["<|bos|>"] == tok.bos and content["meta"] == tok.meta
    source = Path(module.__file__).read_text()
    assert "pickle" not in source and "torch.load" not in source


@given(st.binary())
def test_spelling_of_bytes_is_one_to_one(token):
    assert _unspell(_spell(token)) == token


def broken(path, how):
    text = path.read_text()
    content = json.loads(text)
    content["ranks"][300] += "x"
    return {
        "cut short": text[: len(text) // 2],
        "empty": "",
        "changed": json.dumps(content),
        "list": "[1, 2]",
        "newer": text.replace('"version": 1', '"version": 2'),
    }[how]


@pytest.mark.parametrize("how", ["cut short", "empty", "changed", "list", "newer"])
def test_a_damaged_file_is_refused_with_its_remedy(tok, tmp_path, how):
    path = tok.save(tmp_path)
    path.write_text(broken(path, how))
    with pytest.raises(UserError, match=REMEDY) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_file_of_another_version_is_told_apart_from_a_changed_one(tok, tmp_path):
    path = tok.save(tmp_path)
    path.write_text(broken(path, "newer"))
    with pytest.raises(UserError, match="not a nanochat tokenizer file of version 1"):
        Tokenizer.load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tok, tmp_path):
    path = tok.save(tmp_path)
    path.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(UserError, match=REMEDY):
        Tokenizer.load(tmp_path)


def test_another_split_pattern_is_refused(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATTERN", r"\S+|\s+")
    tok.save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"another split pattern.*{REMEDY}"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_is_refused_with_its_remedy(base_dir):
    with pytest.raises(UserError, match=f"no tokenizer at .*{REMEDY}"):
        Tokenizer.load()


def test_the_fingerprint_tells_vocabularies_apart_and_ignores_meta(tok):
    assert Tokenizer.from_ranks(tok.ranks, {"other": 1}).fingerprint == tok.fingerprint
    swapped = [*tok.ranks[:-2], tok.ranks[-1], tok.ranks[-2]]
    assert Tokenizer.from_ranks(swapped).fingerprint != tok.fingerprint
    assert Tokenizer.from_ranks(tok.ranks[:-1]).fingerprint != tok.fingerprint


# -- tiktoken's own vocabularies --------------------------------------------------------------------------------------


def test_a_builtin_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="gpt2 can't be fetched .*ConnectionError.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.builtin("gpt2")


def test_a_net_that_never_answers_is_given_up(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gate.wait())
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.05)
    with pytest.raises(UserError, match="no answer in"):
        Tokenizer.builtin("gpt2")
    gate.set()


def test_a_builtin_encodes_and_says_what_it_lacks(monkeypatch, tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    with_gap = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: with_gap)
    gpt2 = Tokenizer.builtin("gpt2")
    assert gpt2.encode("hé", prepend=gpt2.bos) == [258, 104, 195, 169]
    assert gpt2.token_bytes().tolist() == [1] * 256 + [0] * 3
    assert gpt2.fingerprint != Tokenizer.from_ranks([bytes([b]) for b in range(256)]).fingerprint
    with pytest.raises(UserError, match="no special token"):
        gpt2.special("<|user_start|>")
    with pytest.raises(UserError, match="not saved"):
        gpt2.save(tmp_path)


def test_an_unknown_builtin_is_refused():
    with pytest.raises(UserError, match="choose one of gpt2, cl100k_base"):
        Tokenizer.builtin("gpt9")
