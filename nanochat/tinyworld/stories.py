"""Short stories: a plot of plots.txt with its variables filled in and told sentence by sentence.

Who and what a story is about is drawn first (`cast`); one combination in 50 of plot, hero and thing belongs to the
validation split. The plots are written so that a story never contradicts itself; check.py reads it back and says so.
"""

import re
from functools import cache
from random import Random
from typing import NamedTuple

from nanochat.tinyworld import grammar, lexicon, world

NICE = ("sunny", "warm", "windy", "cloudy", "hot", "foggy")  # the weather, where a plot does not say


class Step(NamedTuple):
    """One step: its alternatives (rule, who is who), whether it may be left out, whether it tells the day."""

    options: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    optional: bool
    day: bool


class Plot(NamedTuple):
    """A plot: its steps, the questions that may end it, and what its variables must be."""

    name: str
    steps: tuple[Step, ...]
    questions: tuple[Step, ...]
    fixed: dict[str, tuple[str, ...]]


def _step(text: str, fixed: dict[str, tuple[str, ...]]) -> Step:
    text, *settings = text.split()
    for setting in settings:
        name, _, values = setting.partition("=")
        fixed[name] = tuple(values.replace("_", " ").split("/"))
    options = []
    for option in text.lstrip("?@").split("|"):
        name, _, pairs = option.rstrip(")").partition("(")
        options.append((_rule(name), tuple(tuple(pair.split("=")) for pair in pairs.split(",") if pair)))
    return Step(tuple(options), text.startswith("?"), "@" in text)


def _rule(name: str) -> str:
    if name in ("//", "-"):
        return name
    found = [f"{name}.{form}" for form in ("s", "do", "both") if f"{name}.{form}" in grammar.rules()]
    if len(found) != 1:
        raise KeyError(f"plots.txt: the step {name} needs one rule, found {found}")
    return found[0]


def _steps(text: str, fixed: dict[str, tuple[str, ...]]) -> tuple[Step, ...]:
    parts = (part.strip() for part in re.split(r";|(?<=//)", text))
    return tuple(_step(part, fixed) for part in parts if part)


@cache
def plots() -> tuple[Plot, ...]:
    """All plots of plots.txt."""
    found: list[Plot] = []
    for line in (world.DATA / "plots.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name, _, text = line[1:].partition("] ")
            fixed: dict[str, tuple[str, ...]] = {}
            found.append(Plot(name, _steps(text, fixed), (), fixed))
        elif line.startswith("Q:"):
            found[-1] = found[-1]._replace(questions=_steps(line[2:], found[-1].fixed))
    return tuple(found)


@cache
def rules() -> frozenset[str]:
    """The rules of stories.txt: what tells a story."""
    lines = (world.DATA / "stories.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line[1 : line.index("]")] for line in lines if line.startswith("["))


@cache
def _asked() -> frozenset[str]:
    """What questions ask about: the names in their meanings."""
    return frozenset(line[0] for rule in rules() if rule.startswith("q_") for line in grammar.meaning(rule))


@cache
def _names(rule: str) -> bool:
    """Whether a rule calls the subject by name ("...," said Anna), so that no pronoun may stand there."""
    variants = (variant for line in grammar.rules()[rule].lines for variant in line)
    return any(isinstance(p, grammar.Slot) and p[:2] == ("A", "name") for variant in variants for p in variant)


@cache
def _seen(place: str) -> tuple[str, ...]:
    return tuple(thing for thing in world.scenes()[place][1] if world.kind(thing) == "count")


def _pick(values: tuple, rng: Random):
    return values[int(rng.random() * len(values))]


def _two(values: tuple, rng: Random) -> tuple:
    first = int(rng.random() * len(values))
    second = int(rng.random() * (len(values) - 1))
    return values[first], values[second + (second >= first)]


def cast(plot: Plot, split: str, rng: Random) -> grammar.Binding:
    """Every variable of a story; plot, hero and the thing or pet or place are one of the split's combinations."""
    while True:
        env = _cast(plot.fixed, rng)
        if world.held_out("story", plot.name, env["A"], env["x"], env["k"]) == (split == "val"):
            return env


def _cast(fixed: dict[str, tuple[str, ...]], rng: Random) -> grammar.Binding:
    domain = lexicon.domain
    env: grammar.Binding = {"class": "count"}
    env["A"], env["B"] = _two(domain("A")[:-2], rng)
    for name in "kmpfgrthjid":
        env[name] = _pick(domain(name), rng)
    env["w"] = _pick(NICE, rng)
    env["x"], env["y"] = _two(domain("x"), rng)
    env["c"], env["c2"] = _two(domain("c"), rng)
    env["c3"] = _pick(world.lists()["coat_colour"], rng)
    for name, values in fixed.items():
        env[name] = _pick(values, rng)
    env["v"], env["v2"] = _two(_seen(env["p"]), rng)
    _numbers(env, rng)
    return env


def _numbers(env: grammar.Binding, rng: Random) -> None:
    random = rng.random
    env["n"] = n = 4 + int(random() * 9)
    env["n1"] = less = 2 + int(random() * (n - 3))
    env["n2"] = n - less
    env["n3"] = more = 2 + int(random() * 8)
    env["n4"], env["n5"] = n - less + more, n + more
    env["n7"], env["n8"] = int(10 ** (1 + 2 * random())), int(10 ** (1 + 2 * random()))


class Teller:
    """Tells the steps of one story, keeping track of who was spoken of last."""

    def __init__(self, env: grammar.Binding, rng: Random) -> None:
        self.env, self.rng = env, rng
        self.last = ""  # the subject of the last sentence
        self.known = set()  # who has been in the story so far
        self.begun = False  # whether the day of the story has come
        self.state: dict[tuple, object] = {}  # what the story has told and a question may ask
        genders = world.gender()
        self.alike = genders[env["A"]] == genders[env["B"]]

    def scene(self, pairs: tuple[tuple[str, str], ...]) -> grammar.Binding:
        """The variables as this step sees them."""
        env = dict(self.env)
        for inner, outer in pairs:
            env[inner] = self.env[outer]
        return env

    def subject(self, env: grammar.Binding) -> grammar.Binding:
        """The same, with a pronoun for the subject where it is clear who is meant."""
        name = env["A"]
        clear = name == self.last and not (self.alike and len(self.known) > 1)
        if clear and self.rng.random() < 0.5:
            env["A"] = "<she>" if world.gender()[name] == "girl" else "<he>"
        self.known.add(name)
        self.last = name
        return env

    def tell(self, steps: list[tuple[str, grammar.Binding, bool]]) -> str:
        """One sentence for the first of `steps` (rule, variables, tells the day), or for two; removes what it told."""
        rule, env, day = steps.pop(0)
        random = self.rng.random
        self._learn(rule, env)
        if rule.endswith(".s"):
            return self._say(rule, env, speaks_of_b=True)
        if rule.endswith(".both"):
            return self._both(rule, env, day)
        queue = [(rule, env)]
        how = "tell_day.s" if day else "tell_then.s" if self.begun and random() < 0.2 else "tell.s"
        if steps and steps[0][0].endswith(".do") and steps[0][1]["A"] == env["A"] and not steps[0][2] and not day:
            if random() < 0.4:
                queue.append(steps.pop(0)[:2])
                self._learn(*queue[1])
                how = "tell2_then.s" if self.begun else "tell2.s"
        outer = self.subject(env)
        for _, inner in queue:
            inner["A"] = outer["A"]
        outer["queue"] = queue
        self.begun |= day
        return grammar.realise(how, outer, self.rng)

    def _learn(self, rule: str, env: grammar.Binding) -> None:
        for name, arguments, operator, value in grammar.meaning(rule):
            if name in _asked() and operator != "ok":
                self.state[(name, *(env.get(a, a) for a in arguments))] = env.get(value, value)

    def may_ask(self, rule: str, env: grammar.Binding) -> bool:
        """Whether the story has told the answer to a question."""
        lines = (line for line in grammar.meaning(rule) if line[2] == "==")
        return all(self.state.get((n, *(env[a] for a in given))) == env.get(v, v) for n, given, _, v in lines)

    def _say(self, rule: str, env: grammar.Binding, speaks_of_b: bool) -> str:
        if rule.startswith("q_"):
            return grammar.realise(rule, env, self.rng)
        self.known.add(env["A"])
        outer = env if _names(rule) else self.subject(env)
        text = grammar.realise(rule, outer, self.rng)
        if _names(rule):
            self.last = env["A"]
        if env["B"] in text:
            self.known.add(env["B"])
            self.last = ""
        return text

    def _both(self, rule: str, env: grammar.Binding, day: bool) -> str:
        they = not day and len(self.known) > 1 and self.rng.random() < 0.6
        self.known |= {env["A"], env["B"]}
        self.last = ""
        how = "tell_they.s" if they else "tell_both_day.s" if day else "tell_both.s"
        self.begun |= day
        return grammar.realise(how, env | {"queue": [(rule, env)]}, self.rng)


def _chosen(steps: tuple[Step, ...], teller: Teller) -> list[tuple[str, grammar.Binding, bool]]:
    random = teller.rng.random
    found = []
    for step in steps:
        if not step.optional or random() < 0.5:
            rule, pairs = step.options[int(random() * len(step.options))]
            if rule == "//":
                found.append((rule, {}, False))
            elif rule != "-":
                found.append((rule, teller.scene(pairs), step.day))
    return found


def story(split: str, rng: Random) -> str:
    """A story of about 60 to 130 words, its paragraphs on lines of their own, some with questions about it."""
    plot = _pick(plots(), rng)
    teller = Teller(cast(plot, split, rng), rng)
    steps = _chosen(plot.steps, teller)
    paragraphs: list[list[str]] = [[]]
    while steps:
        if steps[0][0] == "//":
            steps.pop(0)
            paragraphs.append([])
        else:
            paragraphs[-1].append(teller.tell(steps))
    lines = [" ".join(sentences) for sentences in paragraphs if sentences]
    return "\n".join(lines + _questions(plot, teller))


def _questions(plot: Plot, teller: Teller) -> list[str]:
    asked = list(plot.questions)
    teller.rng.shuffle(asked)
    steps = [step for step in _chosen(tuple(asked), teller) if teller.may_ask(*step[:2])]
    return [teller.tell([step]) for step in steps[: int(teller.rng.random() * 3)]]
