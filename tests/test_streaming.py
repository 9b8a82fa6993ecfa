"""Text as it comes: whole characters, parts told apart, stop strings found across tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from nanochat.streaming import ReplyStream, StopFinder, TextStream


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_characters_come_whole_and_nothing_is_lost_pitfall_30(text):
    stream = TextStream(TOKENIZER)
    pieces = [stream.feed(token) for token in TOKENIZER.encode(text)]  # the tiny tokenizer: one byte a token
    assert "".join(pieces) + stream.end() == text.encode("utf-8", "replace").decode()
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_an_unfinished_character_is_shown_as_one_replacement_at_the_end_pitfall_32():
    stream = TextStream(TOKENIZER)
    assert [stream.feed(token) for token in "é".encode() + b"\xe2\x82"] == ["", "é", "", ""]
    assert stream.end() == "\ufffd"


def pieces_of(*tokens):
    stream, pieces = ReplyStream(TOKENIZER), []
    for token in tokens:
        for t in [TOKENIZER.special(token)] if token.startswith("<|") else TOKENIZER.encode(token):
            pieces += stream.feed(t)
    pieces += stream.end()
    joined = []
    for kind, text in pieces:
        if joined and joined[-1][0] == kind:
            joined[-1][1] += text
        else:
            joined.append([kind, text])
    return [tuple(pair) for pair in joined]


def test_tool_calls_are_parts_and_special_tokens_never_show_pitfall_30():
    assert pieces_of(
        "6 is ", "<|python_start|>", "2*3", "<|python_end|>", "<|output_start|>", "6", "<|output_end|>", "!"
    ) == [
        ("text", "6 is "),
        ("python", "2*3"),
        ("python_output", "6"),
        ("text", "!"),
    ]
    assert pieces_of("a", "<|assistant_end|>") == [("text", "a")]
    assert pieces_of("a", "<|user_start|>", "b") == [("text", "ab")]


@pytest.mark.parametrize(
    "stops,shown", [(["lo w"], "hel"), (["zzz"], "hello world"), (["d"], "hello worl"), (["o", "llo"], "he")]
)
def test_a_stop_string_is_found_however_the_text_is_cut(stops, shown):
    text = "hello world"
    for size in (1, 2, 3, 11):
        finder = StopFinder(stops)
        out = "".join(finder.feed(text[i : i + size]) for i in range(0, len(text), size)) + finder.end()
        assert out == shown and finder.hit == (shown != text)


@given(
    st.text(alphabet="ab", max_size=20),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_nothing_shown_is_ever_taken_back(text, stops):
    finder = StopFinder(stops)
    out = "".join(finder.feed(c) for c in text) + finder.end()
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not ends:
        assert out == text
        return
    first = text[: min(ends)]  # the text at the moment when the first stop is complete
    assert out == first[: min(at for at in map(first.find, stops) if at >= 0)]
