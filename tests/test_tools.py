"""The calculator's grammar, exactness and bounds, and the state machine that calls it."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from nanochat import tools
from nanochat.tools import ToolState, ToolTokens, calculator

RIGHT = {
    "1+1": "2",
    " 3 * 4 ": "12",
    "2*(3+4)-5": "9",
    "10/4": "2.5",
    "10/5": "2",
    "10/3": "3.3333333333",
    "-1/3": "-0.3333333333",
    "2/3000000": "0.0000006666666667",
    "1/1024": "0.0009765625",
    "-7//2": "-4",
    "-7%3": "2",
    "7%2.5": "2",
    "2**10": "1024",
    "-2**2": "-4",
    "2**-2": "0.25",
    "2**3**2": "512",
    "1.5**2": "2.25",
    "--5": "5",
    ".5*10": "5",
    "007+1": "8",
    "-0.0": "0",
    "1,000+2": "1002",
    "1,234,567.5*2": "2469135",
    "'strawberry'.count('r')": "3",
    '"strawberry".count("r")': "3",
    "'ab'.count('a') + 1": "2",
    "'abc'.count('')": "4",
}


@pytest.mark.parametrize("text", RIGHT)
def test_the_calculator_is_right(text):
    assert calculator(text) == RIGHT[text]


def test_commas_group_digits_and_are_left_alone_in_strings_pitfall_31():
    assert calculator("'a,b,c'.count(',')") == "2"
    assert calculator("1,2") is None and calculator("12,34") is None and calculator("1,0000") is None


@pytest.mark.parametrize("word", ["direction", "profile", "important", "evaluate", "opening", "compiled", "inputs"])
def test_words_that_contain_a_function_name_can_be_counted_in_pitfall_31(word):
    assert calculator(f"'{word}'.count('{word[0]}')") == str(word.count(word[0]))


def test_strings_may_hold_hyphens_quotes_and_other_alphabets_pitfall_31():
    assert calculator("'well-known'.count('-')") == "1"
    assert calculator("'naïve café'.count('é')") == "1"
    assert calculator('"don\'t".count("\'")') == "1"
    assert calculator("'数学数'.count('数')") == "2"


def test_decimals_are_exact_pitfall_31():
    assert calculator("0.1+0.2") == "0.3"
    assert calculator("1.1*1.1") == "1.21"
    assert calculator("1/3*3") == "1"
    assert calculator("100*1.15") == "115"


def test_the_calculator_works_in_any_thread_pitfall_31():
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(calculator("6*7"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["42"] * 8


BOMBS = [
    "'a'.zfill(1500000000).count('0')",
    "9**9**9",
    "9**9**9**9",
    "2**999999999",
    "(2**300)**300",
    "10**99*10**99",
    "'a'*999999999",
    "(" * 120 + "1" + ")" * 120,
    "-" * 250 + "1",
    "1+" * 5000 + "1",
    "9" * 5000,
    "'" + "a" * 10**6 + "'.count('a')",
    "((((2**99)**99)**99)**99)",
    "1/" * 120 + "1.00000001",
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: b[:24])
def test_no_expression_costs_time_or_memory_pitfall_31(bomb):
    begin = time.process_time()
    answer = calculator(bomb)
    assert time.process_time() - begin < 0.5
    assert answer is None or len(answer) <= 2 * tools.MAX_DIGITS


def test_results_past_the_digit_bound_are_refused_not_raised_pitfall_31():
    assert len(calculator("10**99")) == 100
    assert calculator("10**100") is None
    assert calculator("99999999999999999999**5*10") is None
    assert calculator("99999999999999999999**5") is not None


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "1+", "()", "1 2", "1e5", "0x10", "1j", "1_000", "True", "'a'", "'a'+'b'", "1/0", "1//0", "5%0"]
    + ["0**-1", "2**0.5", "1==1", "1<2", "1 if 1 else 2", "[1]", "x.count('a')", "'a'.upper()", "'a'.count('a','b')"]
    + ["__import__('os').system('true')", "(1).__class__", "'{0}'.format(1)", "f'{1}'", "'\\x41'.count('A')", "1;2"]
    + ["'a'.count(x='a')", "'a'.count", "1\n+1", "٣+1", "1\x00", "lambda:1", "print(1)", "0.5.", ".", "1..count('a')"],
)
def test_what_is_outside_the_grammar_has_no_value(text):
    assert calculator(text) is None


@given(st.text(alphabet="0123456789+-*/%(). ,'\"count_eajx\\ é", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_a_short_string_or_none(text):
    answer = calculator(text)
    assert answer is None or (0 < len(answer) <= 2 * tools.MAX_DIGITS + 3 and set(answer) <= set("0123456789.-"))


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.sampled_from("+-*"))
@settings(max_examples=100, deadline=None)
def test_whole_numbers_agree_with_python(a, b, op):
    assert calculator(f"({a}){op}({b})") == str({"+": a + b, "-": a - b, "*": a * b}[op])


# -- the state machine ------------------------------------------------------------------------------------------------


def ids(text):
    """Text with tool tokens written «» (python) and ‹› (output) to ids."""
    names = {"«": "python_start", "»": "python_end", "‹": "output_start", "›": "output_end"}
    out = []
    for c in text:
        out += [TOKENIZER.special(f"<|{names[c]}|>")] if c in names else TOKENIZER.encode(c)
    return out


def forced_after(text):
    state = ToolState(ToolTokens.of(TOKENIZER))
    for token in ids(text):
        state.feed(token)
    return list(state.forced)


def test_a_call_queues_its_answer_between_the_output_tokens():
    assert forced_after("so «2*3»") == ids("‹6›")


def test_nothing_is_queued_before_the_call_ends_or_outside_one():
    assert forced_after("«2*3") == []
    assert forced_after("2*3»") == []


@pytest.mark.parametrize("text", ["«»", "«1/0»", "«hello»", "«" + "1+" * 200 + "1»"])
def test_a_failed_call_queues_nothing(text):
    assert forced_after(text) == []


def test_a_second_call_starts_afresh():
    assert forced_after("«1/0»«2+2»") == ids("‹4›")
    assert forced_after("«9«2+2»") == ids("‹4›")
