"""tinyworld/talk, questions, skills, sums: conversations are true, well formed, repeatable, and their splits apart."""

import re
from random import Random

import pytest

from nanochat import chat
from nanochat.errors import UserError
from nanochat.tinyworld import documents, exam, facts, questions, skills, sums, talk
from nanochat.tools import calculator
from tasks import common, tinyworld


def users(conversations):
    return [m["content"] for c in conversations for m in c["messages"] if m["role"] == "user"]


@pytest.fixture(scope="module")
def many():
    return list(tinyworld.TinyWorldTalk("train", size=4000))


def fact(subject, relation):
    return next(f for f in facts.about()[subject] if f.relation == relation)


# -- form --------------------------------------------------------------------------------------------------------------


def test_every_conversation_has_the_form_that_chat_asks_for(many):
    for conversation in many:
        chat.check(conversation)
        for message in conversation["messages"]:
            assert common.text_of(message["content"]).strip()
    assert all(set(talk.KINDS[kind](Random(5), True)[0][0]) for kind in talk.KINDS)


def test_a_conversation_depends_on_its_arguments_alone():
    again = [talk.conversation("train", i, 3) for i in range(50)]
    assert again == [talk.conversation("train", i, 3) for i in range(50)]
    assert again != [talk.conversation("train", i, 4) for i in range(50)]
    assert again != [talk.conversation("val", i, 3) for i in range(50)]


def test_an_unknown_split_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="split"):
        talk.conversation("dev", 0)


def test_slots_are_all_filled_and_sentences_begin_with_a_capital(many):
    for conversation in many:
        for message in conversation["messages"]:
            text = common.text_of(message["content"])
            assert not re.search(r"[{}]|  ", text), text
            if message["role"] == "assistant" and len(text) > 1 and not text.startswith("a b c"):
                assert text[0].isupper() or "-" in text.split()[0], text


def test_conversations_are_short_and_varied(many):
    words = [sum(len(common.text_of(m["content"]).split()) for m in c["messages"]) for c in many]
    assert sorted(words)[len(words) // 2] < 40
    assert len({str(c) for c in many}) > 0.85 * len(many)
    assert len({w.lower() for c in many for m in c["messages"] for w in str(m["content"]).split()}) > 2000


# -- held out ----------------------------------------------------------------------------------------------------------


def assert_free_of_held_out_wordings(texts):
    texts = list(map(exam.plain, texts))
    for wording in exam.held_out_wordings():
        for text in [text for text in texts if wording.longest in text]:  # the quick part of `in_text`, without calls
            assert not wording.in_text(text), f"{wording.template!r} is in {text!r}"


def test_no_training_text_uses_a_wording_of_the_benchmark(many):
    assert_free_of_held_out_wordings(users(many))
    assert_free_of_held_out_wordings(line for i in range(300) for line in documents.document("train", i).split("\n"))


@pytest.mark.slow
def test_no_question_put_together_from_parts_is_a_wording_of_the_benchmark():
    """Every opener, ending and embedder with every wording, a fact each: what a random sample may miss."""
    texts = []
    for relation in questions.relations():
        some = facts.relations()[relation]
        for form in ("ask", "tell", "back", "yes"):
            shapes = questions.OPENERS if form != "tell" else questions.EMBEDDERS + questions.CLAUSE_EMBEDDERS
            for template in questions.wordings(relation, form):
                one = next((f for f in some if questions.fits(template, f)), some[0])
                texts += [shape.format(template.format_map(questions.slots(one))) for shape in (*shapes, "{}")]
    assert len(texts) > 50_000
    assert_free_of_held_out_wordings(texts)


@pytest.mark.slow
def test_no_training_text_uses_a_wording_of_the_benchmark_over_20_000_conversations():
    assert_free_of_held_out_wordings(users(tinyworld.TinyWorldTalk("train", size=20_000, seed=1)))
    assert_free_of_held_out_wordings(line for i in range(5000) for line in documents.document("train", i).split("\n"))


def test_the_detector_of_wordings_sees_every_question_of_the_benchmark():
    wordings = exam.held_out_wordings()
    for item in exam.fact_items(300, 7) + exam.identity_items():
        assert any(wording.in_text(exam.plain(item.question)) for wording in wordings), item.question


def test_a_fact_and_a_wording_asked_in_the_test_split_never_meet_in_training():
    for one in facts.facts()[::5]:
        train, test = set(questions.cores(one, False)), set(questions.cores(one, True))
        assert train and not train & test
        assert not (set(questions.back_cores(one, False)) and set(questions.back_cores(one, True)))


def test_every_relation_has_fifteen_training_questions_and_three_held_out_ones():
    for relation in facts.relations():
        some = next(f for f in facts.relations()[relation] if len(questions.cores(f, False)) > 2)
        assert len({questions.ask(Random(i), some, False) for i in range(200)}) >= 15, relation
        assert len(questions.wordings(relation, "ask", exam.HELD_OUT)) >= 3, relation


def test_pairs_of_numbers_are_apart_whatever_their_order_and_operator():
    rng = Random(1)
    pairs = {test: {frozenset(sums.pair(rng, test, (2,), (2,))) for _ in range(3000)} for test in (False, True)}
    assert not pairs[False] & pairs[True]
    assert 0.05 < sum(sums.held_out(a, b) for a in range(10, 100) for b in range(a, 100)) / 4095 < 0.15


def test_no_training_document_works_out_or_types_a_held_out_pair():
    seen = 0
    for i in range(800):
        for a, b in re.findall(
            r"(?<![+*-] )\b(\d+) (?:[+*-]|plus|minus|times) (\d+)\b", documents.document("train", i)
        ):
            seen += int(a) >= sums.SMALL
            assert not sums.held_out(int(a), int(b)), (i, a, b)
    assert seen > 30


def test_skills_keep_their_combinations_apart():
    assert not set(skills.short_words(True)) & set(skills.short_words(False))
    assert not set(skills.people(True)) & set(skills.people(False))
    assert not set(talk.nonsense(True)) & set(talk.nonsense(False))


# -- truth -------------------------------------------------------------------------------------------------------------


def test_every_answer_to_a_fact_question_is_right_by_the_rule():
    for one in facts.facts():
        assert questions.right(one, questions.answer(one)), one
        if questions.back_cores(one, False) + questions.back_cores(one, True):
            assert questions.right(one, questions.answer(one, back=True), back=True), one


@pytest.mark.parametrize(
    "subject, relation, reply, verdict",
    [
        ("lemon", "colour", "A lemon is yellow.", True),
        ("lemon", "colour", "Yellow", True),
        ("lemon", "colour", "A lemon is green.", False),
        ("lemon", "colour", "A lemon is yellow or green.", False),
        ("lemon", "colour", "It is yellowish.", False),
        ("lemon", "colour", "", False),
        ("zebra", "colour", "A zebra is black and white.", True),
        ("zebra", "colour", "A zebra is black.", False),
        ("dog", "legs", "A dog has 4 legs.", True),
        ("spider", "legs", "A spider has six legs.", False),
        ("snake", "legs", "A snake has no legs.", True),
        ("eagle", "is_a", "An eagle is a bird, and birds are animals.", True),
        ("hot", "opposite", "The opposite of hot is cold.", True),
        ("hot", "opposite", "The opposite of hot is hot.", False),
        ("teacher", "job", "A teacher teaches children.", True),
        ("teacher", "job", "A teacher sails ships.", False),
        ("penguin", "cannot", "A penguin cannot fly.", True),
        ("penguin", "cannot", "Yes, a penguin can fly.", False),
        ("France", "capital", "The capital of France is Paris.", True),
        ("France", "capital", "The capital of France is Paris, not Rome.", False),
        ("sheep", "plural", "The plural of sheep is sheep.", True),
    ],
)
def test_the_rule_for_right(subject, relation, reply, verdict):
    assert questions.right(fact(subject, relation), reply) is verdict


def test_asked_backwards_the_subject_counts():
    paris = fact("France", "capital")
    assert questions.right(paris, "Paris is the capital of France.", back=True)
    assert not questions.right(paris, "Paris is the capital of Italy.", back=True)
    assert questions.answer(fact("Monday", "next_day"), back=True) == "Monday comes before Tuesday."


def test_yes_and_no_are_true():
    rng, seen = Random(3), set()
    for _ in range(2000):
        one = questions.draw_fact(rng, False)
        if questions.wordings(one.relation, "yes"):
            question, reply = questions.yes_or_no(rng, one)
            says_yes = reply.startswith("Yes, ")
            assert says_yes == bool(re.search(rf"\b{re.escape(one.object)}\b", question, re.I)), question
            seen.add(says_yes)
    assert seen == {True, False}


def test_multiple_choice_offers_exactly_one_right_answer(many):
    asked = [c for c in many if "letters" in c]
    assert len(asked) > 100
    for conversation in asked:
        subject, relation, _ = conversation["fact"]
        lines = re.findall(r"^- (.*)=([A-Z])$", conversation["messages"][0]["content"], re.M)
        assert len(lines) == len(conversation["letters"]) >= 2
        right = [letter for choice, letter in lines if facts.true(subject, relation, choice)]
        assert right == [conversation["messages"][1]["content"]]


def test_the_calculator_agrees_with_every_worked_answer(many):
    calls = [
        call for c in many for m in c["messages"] if m["role"] == "assistant"
        for call in common.tool_calls(m["content"])
    ]  # fmt: skip
    assert len(calls) > 600
    for expression, output in calls:
        assert calculator(expression) == output


@pytest.mark.parametrize("kind", sums.KINDS)
def test_a_problem_is_solved_by_its_expression_and_its_pair_is_of_the_split(kind):
    rng = Random(kind)
    for k in range(300):
        problem = sums.MAKERS[kind](rng, bool(k % 2))
        assert calculator(problem.expression) == str(problem.value)
        assert problem.value >= 0
        a, b = map(int, re.findall(r"\d+", problem.expression)[:2])
        assert sums.held_out(a, b) == bool(k % 2)
        assert sums.right(problem.value, problem.content()[-1]["text"])
        assert all(number in problem.question for number in re.findall(r"\d+", problem.expression))


def test_a_call_is_the_question_s_own_spelling_where_it_uses_symbols():
    problem = next(p for p in (sums.make_plain(Random(i), False) for i in range(100)) if " * " in p.question)
    assert problem.expression in problem.question


def test_a_phrase_among_words_that_say_nothing_stands_there_once_and_whole():
    asked = [questions.among_words(Random(i), "84 + 843", sums._some_words()) for i in range(500)]
    assert all(re.findall(r"[\d+]+", text) == ["84", "+", "843"] for text in asked)
    words = {word for text in asked for word in re.findall("[a-z]+", text.lower())}
    known = words & facts.words()
    assert len(known) > 300 and len(words - known) > 300  # words of the world, and words that nobody knows
    last = sum(bool(re.search(r"843\W*$", text)) for text in asked)
    assert 50 < last < 200  # mostly words follow, too


def test_of_a_thing_that_is_only_named_the_answer_says_what_it_is():
    things = {word for f in facts.relations()["is_a"] for word in f.subject.lower().split()}
    for i, one in enumerate(questions.askable("is_a", False)):
        question, answer = talk.only_named(Random(i), one)
        assert one.subject.lower()[:3] in question.lower() and questions.right(one, answer)
        own = {*one.subject.lower().split(), *questions.SMALL_WORDS}
        assert things & set(re.findall("[a-z]+", question.lower())) <= own, question  # no other thing beside it


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 18.", 18),
        ("18.00", 18),
        ("It costs $1,800.", 1800),
        ("-3", -3),
        ("2 + 3 = 5", 5),
        ("none", None),
    ],
)
def test_the_last_number_of_a_reply_is_read_as_a_person_would_pitfall_39(text, number):
    assert sums.final_number(text) == number


# -- tasks ----------------------------------------------------------------------------------------------------------


def test_reference_answers_are_right_and_others_are_not():
    tasks = tinyworld.TinyWorldFacts("open"), tinyworld.TinyWorldFacts("choice"), tinyworld.TinyWorldSums("test")
    for task in tasks:
        for conversation in task:
            assert task.reward(conversation, common.reference_of(conversation)) == 1.0
            assert task.reward(conversation, "I do not know.") == 0.0


def test_the_choices_of_the_evaluation_are_four_so_that_chance_is_a_quarter():
    task = tinyworld.TinyWorldFacts("choice", size=300)
    assert task.baseline == 0.25 and all(len(c["letters"]) == 4 for c in task)


def test_tasks_of_the_test_split_share_no_question_with_training(many):
    train = set(users(many))
    for conversation in (*tinyworld.TinyWorldFacts("open", size=300), *tinyworld.TinyWorldSums("test", size=300)):
        assert conversation["messages"][0]["content"] not in train


@pytest.mark.parametrize("make", [lambda: tinyworld.TinyWorldTalk("dev"), lambda: tinyworld.TinyWorldSums(size=0),
                                  lambda: tinyworld.TinyWorldFacts("essay")])  # fmt: skip
def test_senseless_tasks_are_refused_with_a_sentence(make):
    with pytest.raises(UserError):
        make()
