"""What sentences mean: facts to be true, numbers to be right, a story's state to hold together.

The lines of a rule that start with "=" are read here. With variables (a letter, perhaps a digit) and words for values:

    at(A) := p          from now on
    colour(x) == c      it must be so; where nothing is known yet, it is so from now on (or an error: see STRICT)
    count(A) -= n       less, more (+=)
    ok sum(n1,n2,n3)    one of CHECKS must hold

A line that speaks of a variable which the sentence leaves out does not count. A sentence with a relation R states a
fact.
"""

from functools import cache

from nanochat.tinyworld import facts, grammar, stories, world
from nanochat.tinyworld.checks import CHECKS

STRICT = {
    "has",
    "kind",
    "owner",
    "broken",
    "dirty",
    "gone",
    "hurt",
    "dark",
    "rain",
    "sick",
    "need",
    "where",
    "finder",
    "loser",
}
STRICT |= {"ate", "made", "drew", "flower", "winner", "trip", "game", "first", "second", "total", "message", "number"}
STRICT |= {"thing", "place", "price", "years", "said", "count", "know"}
STATED = {
    "says.s",
    "number_of.s",
    "age_of.s",
    "thing_of.s",
    "place_of.s",
    "price.s",
    "pass_on.s",
}  # may be the first to say


@cache
def is_story(rule: str) -> bool:
    """Whether a rule tells part of a story, whose people and pets must have been introduced."""
    return rule in stories.rules()


class Context:
    """What the text has said so far. `tell(binding)` adds a reading's meaning and returns what is wrong with it."""

    def __init__(self) -> None:
        self.state: dict[tuple, object] = {}
        self.people: list[str] = []  # those introduced, the last mentioned at the end
        self.topic = ""  # what "it" is in texts about facts
        self.me: list[tuple[str, str]] = []  # what a riddle has said of itself

    def copy(self) -> "Context":
        """A copy to try a reading on."""
        other = Context()
        other.state, other.people = dict(self.state), list(self.people)
        other.topic, other.me = self.topic, list(self.me)
        return other

    def become(self, other: "Context") -> None:
        """Take over the state of a copy."""
        self.state, self.people, self.topic, self.me = other.state, other.people, other.topic, other.me

    def tell(self, bound: grammar.Binding) -> list[str]:
        """The problems of a reading; the state is changed as far as it goes."""
        best: list[str] | None = None
        for candidate in self._resolved(bound):
            trial = self.copy()
            found = trial._tell(candidate)
            if best is None or not found:
                best, kept = found, trial
            if not found:
                break
        if best is None:
            return [f"nobody here is meant by {bound['A']}"]
        self.become(kept)
        return best

    def _resolved(self, bound: grammar.Binding) -> list[grammar.Binding]:
        """The reading with every pronoun replaced by those it may stand for, the likeliest first."""
        if bound["rule"].startswith("tell_they"):
            return [bound | {"A": a, "B": b} for a, b in zip(self.people[-2:-1], self.people[-1:])]
        found = [bound]
        for name in ("A", "B"):
            sex = {"<she>": "girl", "<he>": "boy"}.get(bound.get(name))
            if sex:
                candidates = [who for who in reversed(self.people) if world.gender()[who] == sex]
                found = [reading | {name: who} for reading in found for who in candidates]
        return [reading for reading in found if reading.get("A") != reading.get("B") or "A" not in reading]

    def _tell(self, bound: grammar.Binding) -> list[str]:
        problems = self._one(bound)
        for event in bound.get("events", ()):
            people = {name: bound[name] for name in ("A", "B") if name in bound and (name == "A" or name not in event)}
            if not event["rule"].endswith(".both"):
                people.pop("B", None)
            problems += self._one(event | people)
        return problems

    def _one(self, bound: grammar.Binding) -> list[str]:
        if bound.get("R") or bound["rule"] == "riddle.s":
            return self._fact(bound) + self._meaning(bound)
        if not is_story(bound["rule"]):
            self.topic = bound.get("v", self.topic)  # "You can find a squirrel in the forest. It eats nuts."
            return self._meaning(bound)
        bound, problems = self._pets(bound)
        problems += self._meaning(bound)
        return problems + self._mentions(bound)

    def _fact(self, bound: grammar.Binding) -> list[str]:
        if bound["rule"] == "riddle.s":
            wrong = [f"{bound['S']} {r} {o}" for r, o in self.me if not facts.true(bound["S"], r, o)]
            self.me = []
            return [f"false: {what}" for what in wrong]
        if bound["rule"] == "riddle_line.s":
            self.me.append((bound["R"], bound["O"]))
            return [] if facts.subjects(bound["R"], bound["O"]) else [f"false: nothing {bound['R']} {bound['O']}"]
        subject = self.topic if bound.get("S") == "<it>" else bound.get("S", "")
        self.topic = subject
        if "O" in bound and not facts.true(subject, bound["R"], bound["O"]):
            return [f"false: {subject} {bound['R']} {bound['O']}"]
        return []

    def _pets(self, bound: grammar.Binding) -> tuple[grammar.Binding, list[str]]:
        """A pet named only by its kind is the pet of that kind; a name that nobody knows is a problem."""
        if "m" in bound:
            known = ("kind", bound["m"]) in self.state or bound["rule"] == "pet.s"
            return bound, [] if known else [f"who is {bound['m']}?"]
        if "k" not in bound:
            return bound, []
        pets = [key[1] for key, value in self.state.items() if key[0] == "kind" and value == bound["k"]]
        return (bound | {"m": pets[-1]}, []) if pets else (bound, [f"which {bound['k']}?"])

    def _mentions(self, bound: grammar.Binding) -> list[str]:
        problems = []
        for name in ("B", "A"):
            who = bound.get(name)
            if who in world.gender():
                if who in self.people:
                    self.people.remove(who)
                elif self.state.get(("know", who)) != "yes":
                    problems.append(f"who is {who}?")
                self.people.append(who)
        return problems

    def _meaning(self, bound: grammar.Binding) -> list[str]:
        problems = []
        for name, arguments, operator, value in grammar.meaning(bound["rule"]):
            given = [grammar.value(argument, bound) for argument in arguments]
            target = grammar.value(value, bound)
            if None in given or target is None:
                continue
            if operator == "ok":
                problems += [] if CHECKS[name](self, *given) else [f"false: {name}{tuple(given)}"]
            else:
                problems += self._state((name, *given), operator, target, bound["rule"])
        return problems

    def _state(self, key: tuple, operator: str, value: object, rule: str) -> list[str]:
        old = self.state.get(key)
        if operator in ("-=", "+="):
            if not isinstance(old, int):
                return [f"{key} is not known"]
            value = old + value if operator == "+=" else old - value
        elif operator == "==" and old is None and key[0] in STRICT and rule not in STATED:
            return [f"{key} is not known"]
        elif operator == "==" and old is not None and old != value:
            return [f"contradiction: {key} was {old}, not {value}"]
        self.state[key] = value
        return []
