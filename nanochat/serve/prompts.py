"""A chat that fits the model: the newest whole turns, with room left for the reply. For the CLI and the server."""

from typing import Any, NamedTuple

from nanochat import chat

LEAST_SHARE = 0.5  # of the context that a prompt may fill whatever --max-tokens asks for


class Prompt(NamedTuple):
    """Ids that ask for a reply, and the messages that did not fit before them."""

    ids: list[int]
    dropped: int


def fit(messages: list[dict[str, Any]], tokenizer, context: int, max_tokens: int) -> Prompt:
    """Drop the oldest whole turns until `max_tokens` more tokens fit into `context`, or at least half of it is prompt.

    UserError: not a conversation that ends with the user, or its last message alone does not fit.
    """
    budget = max(context - max_tokens, int(context * LEAST_SHARE))
    ids, kept = chat.render_for_completion({"messages": messages}, tokenizer), messages
    if len(ids) > budget:
        kept = chat.trim(messages, tokenizer, budget)
        ids = chat.render_for_completion({"messages": kept}, tokenizer)
    return Prompt(ids, len(messages) - len(kept))
