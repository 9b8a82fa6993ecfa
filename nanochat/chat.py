"""A conversation as token ids and a loss mask: the one chat format, for training and for talking.

    conversation = {"messages": [{"role": "user", "content": "What is 7*8?"}, {"role": "assistant", "content": ...}]}

After an optional system message, user and assistant alternate, the user first. Content is a string, or a list of parts
{"type": "text" | "python" | "python_output", "text": ...}; python parts only in what the assistant says. As ids:

    bos  user_start text user_end  assistant_start text python_start expr python_end output_start result output_end
         text assistant_end  user_start ...

There is no system token: a system message stands before the first user message, a blank line between. The mask is 1 on
what the model is to say itself: text, python parts with their two delimiters, assistant_end. It is 0 on bos, all that
the user says, assistant_start, and on python_output with its delimiters (the calculator writes those).
"""

from itertools import groupby
from typing import Any

from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer

DELIMITERS = {"python": ("<|python_start|>", "<|python_end|>"), "python_output": ("<|output_start|>", "<|output_end|>")}
OPENS = {start: kind for kind, (start, _) in DELIMITERS.items()}
CLOSES = {end: kind for kind, (_, end) in DELIMITERS.items()}
TURN_ENDS = ("<|assistant_end|>", "<|bos|>")
SMALLEST_ROW = 5  # bos, user_start, user_end, assistant_start and one token to learn
GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"

Ids = list[int]
Message = dict[str, Any]


# -- is it a conversation? --------------------------------------------------------------------------------------------


def check(conversation: Any) -> None:
    """Raise a UserError that says in one sentence why this is not a conversation; do nothing if it is one."""
    problem = _problem(conversation)
    if problem:
        raise UserError(f"This is not a conversation: {problem}.")


def _problem(conversation: Any) -> str | None:
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        return 'it must be an object whose "messages" is a list of at least one message'
    with_system = int(isinstance(messages[0], dict) and messages[0].get("role") == "system")
    wanted = ["system"] * with_system + ["user", "assistant"] * len(messages)
    if len(messages) == with_system:
        return "its system message has no user message after it"
    for number, (message, role) in enumerate(zip(messages, wanted), start=1):
        problem = _message_problem(message, role)
        if problem:
            return f"message {number} {problem}"
    return None


def _message_problem(message: Any, role: str) -> str | None:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        return 'must be an object with "role" and "content"'
    if message["role"] != role:
        return f"has the role {message['role']!r} where {role!r} must stand (user and assistant alternate, user first)"
    kinds = ("text", *DELIMITERS) if role == "assistant" else ("text",)
    content = message["content"]
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return "has a content that is neither a string nor a list of parts"
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            return f'of the {role} has a part that is not {{"type": {" or ".join(kinds)}, "text": a string}}'
    return None


# -- conversation to ids ----------------------------------------------------------------------------------------------


def render(conversation: dict, tokenizer: Tokenizer, max_tokens: int = 2048) -> tuple[Ids, list[int]]:
    """A conversation to learn from, as (ids, mask) of equal length, at most `max_tokens` and never without a target.

    A longer one is cut after `max_tokens`. If that would leave nothing to learn (the prompt alone fills the row), the
    prompt loses its beginning instead: bos and user_start, the newest tokens of the prompt, and at least the first half
    row of what follows from the first target on. UserError: no assistant message, or `max_tokens` below 5.
    """
    check(conversation)
    ids, mask = _render(conversation["messages"], tokenizer)
    if 1 not in mask:
        raise UserError("The conversation has nothing to learn from: it holds no assistant message.")
    return _cut(ids, mask, max_tokens)


def _cut(ids: Ids, mask: list[int], max_tokens: int) -> tuple[Ids, list[int]]:
    _check_room(max_tokens)
    if 1 in mask[:max_tokens]:
        return ids[:max_tokens], mask[:max_tokens]
    first, room = mask.index(1), max_tokens - 2
    learn = min(len(ids) - first, room // 2)
    start, stop = first - (room - learn), first + learn
    return ids[:2] + ids[start:stop], mask[:2] + mask[start:stop]


def render_for_completion(
    conversation: dict, tokenizer: Tokenizer, max_tokens: int | None = None, cut: bool = False
) -> Ids:
    """The ids that ask for a reply: everything up to the last user message, then assistant_start.

    A last assistant message (a task's reference answer) is left out. With `max_tokens` the oldest whole turns give way
    (see `trim`); if the last user message alone is longer, that is a UserError, or with `cut` (evaluation, which must
    not stop) the message loses its beginning.
    """
    check(conversation)
    messages = conversation["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if max_tokens is not None:
        messages = _newest(messages, tokenizer, max_tokens) if cut else trim(messages, tokenizer, max_tokens)
    ids = _render(messages, tokenizer)[0] + [tokenizer.special("<|assistant_start|>")]
    if max_tokens is not None and len(ids) > max_tokens:
        return ids[:2] + ids[len(ids) - (max_tokens - 2) :]
    return ids


def trim(messages: list[Message], tokenizer: Tokenizer, budget: int) -> list[Message]:
    """The newest messages that fit in `budget` tokens, rendered: oldest whole turns go first, the system message stays.

    If the last message is the user's, the assistant_start behind it is counted too. UserError: the last turn alone
    does not fit.
    """
    check({"messages": messages})
    kept = _newest(messages, tokenizer, budget)
    need = _size(kept, tokenizer)
    if need > budget:
        raise UserError(f"The last message takes {need} tokens and {budget} fit into the context: shorten it.")
    return kept


def _newest(messages: list[Message], tokenizer: Tokenizer, budget: int) -> list[Message]:
    """The longest run of newest whole turns that fits (a turn: user and assistant), at least the last turn."""
    _check_room(budget)
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    sizes = [len(_message(message, tokenizer)[0]) for message in turns]
    kept = messages
    for start in range(0, len(turns), 2):
        kept = [*system, *turns[start:]]
        if sum(sizes[start:]) <= budget and _size(kept, tokenizer) <= budget:
            break
    return kept


def _size(messages: list[Message], tokenizer: Tokenizer) -> int:
    return len(_render(messages, tokenizer)[0]) + (messages[-1]["role"] == "user")


def _check_room(tokens: int) -> None:
    if tokens < SMALLEST_ROW:
        raise UserError(f"{tokens} tokens can't hold a conversation: allow {SMALLEST_ROW} or more.")


def _render(messages: list[Message], tokenizer: Tokenizer) -> tuple[Ids, list[int]]:
    """Checked messages as (ids, mask), whole."""
    ids, mask = [tokenizer.bos], [0]
    for message in _with_system_joined(messages):
        more_ids, more_mask = _message(message, tokenizer)
        ids += more_ids
        mask += more_mask
    return ids, mask


def _with_system_joined(messages: list[Message]) -> list[Message]:
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{_words(system)}\n\n{_words(user)}"}, *rest]


def _words(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _message(message: Message, tokenizer: Tokenizer) -> tuple[Ids, list[int]]:
    """One message of the user or the assistant as (ids, mask), its delimiters included."""
    if message["role"] == "user":
        ids = tokenizer.encode(_words(message), prepend="<|user_start|>", append="<|user_end|>")
        return ids, [0] * len(ids)
    ids, mask = [tokenizer.special("<|assistant_start|>")], [0]
    content = message["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        part_ids = _part(part, tokenizer)
        ids += part_ids
        mask += [int(part["type"] != "python_output")] * len(part_ids)
    return ids + [tokenizer.special("<|assistant_end|>")], mask + [1]


def _part(part: dict, tokenizer: Tokenizer) -> Ids:
    """One part as ids. Its own "ids" (see `parse_reply`) are taken only if they spell its text without specials."""
    own = part.get("ids")
    ids = list(own) if _spells(own, part["text"], tokenizer) else tokenizer.encode(part["text"])
    if part["type"] == "text":
        return ids
    start, end = (tokenizer.special(name) for name in DELIMITERS[part["type"]])
    return [start, *ids, end]


def _spells(ids: Any, text: str, tokenizer: Tokenizer) -> bool:
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids):
        return False
    return not any(map(tokenizer.is_special, ids)) and tokenizer.decode(ids) == text


# -- ids to conversation ----------------------------------------------------------------------------------------------


def parse_reply(ids: Ids, tokenizer: Tokenizer) -> list[dict]:
    """What the model generated after assistant_start, as content parts that render to the same ids again.

    Stops at assistant_end or bos. A model need not choose the tokens that `encode` would: then the part also carries
    "ids", so that the next turn sees exactly what was said (and a cache of it stays valid). What no conversation can
    hold is mended: a block left open is closed, a special token out of place is left out.
    """
    names = {tokenizer.special(name): name for name in (*OPENS, *CLOSES, *TURN_ENDS)}
    parts: list[dict] = []
    kind, run = "text", []
    for token in ids:
        name = names.get(token)
        if name in TURN_ENDS:
            break
        if name in OPENS or name is not None and CLOSES[name] == kind:
            _finish(parts, kind, run, tokenizer)
            kind, run = OPENS.get(name, "text"), []
        elif not tokenizer.is_special(token):
            run.append(token)
    _finish(parts, kind, run, tokenizer)
    return parts


def _finish(parts: list[dict], kind: str, run: Ids, tokenizer: Tokenizer) -> None:
    """Append the part that `run` makes; text of no tokens is no part."""
    if kind == "text" and not run:
        return
    part: dict[str, Any] = {"type": kind, "text": tokenizer.decode(run)}
    if tokenizer.encode(part["text"]) != run:
        part["ids"] = run
    parts.append(part)


def picture(ids: Ids, mask: list[int], tokenizer: Tokenizer) -> str:
    """The rendered text for a terminal: green where the model learns, red where it only reads."""
    runs = groupby(zip(ids, mask), key=lambda pair: pair[1])
    return "".join(f"{GREEN if on else RED}{tokenizer.decode(i for i, _ in run)}{PLAIN}" for on, run in runs)
