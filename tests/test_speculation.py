"""Guesses come from the text itself, and stop where they are never right."""

from nanochat.speculation import Drafter


def test_guesses_stop_where_they_are_never_right():
    drafter, ids = Drafter(), [1, 2, 3, 4, 1, 2, 3]
    assert drafter.propose(ids, 3) == [4, 1, 2]
    drafter.learn(0)
    assert drafter.propose(ids, 3) == [] != drafter.propose(ids, 3)
    drafter.learn(2)
    assert drafter.propose([*ids, 4], 2) == [1, 2]


def test_the_newest_of_several_places_is_taken():
    drafter = Drafter()
    assert drafter.propose([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3], 2) == [5, 0]
    assert drafter.propose([1, 2, 3], 2) == [] == drafter.propose([1, 2, 3, 4, 0, 1, 2, 3], 0)
