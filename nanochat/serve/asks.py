"""What clients may ask: the request bodies, every number bounded, and their way to messages and a Sampling.

A body of wrong types is refused by pydantic (422, or 400 in OpenAI's form under /v1), a wrong value by `check` (400).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from nanochat import chat
from nanochat.errors import UserError, refuse
from nanochat.sampling import Sampling

MAX_BODY = 1 << 20  # bytes
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8000  # of what a user writes; a reply may be longer, and comes back in the next request
MAX_CHARS = 32000  # of all messages together
MAX_PARTS = 100  # of one message
MAX_TOKENS = 4096
MAX_N = 8
MAX_TEMPERATURE, MAX_TOP_K = 2.0, 200
PART_KINDS = ("text", "python", "python_output")

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Part(BaseModel):
    """A piece of a message: text, or a calculator call and its answer. `ids` as the server gave them, if kept."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "python", "python_output"]
    text: StrictStr
    ids: list[StrictInt] | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: StrictStr
    content: StrictStr | list[Part]

    def size(self) -> int:
        """Its characters."""
        return len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content)

    def plain(self) -> dict[str, Any]:
        """The message as nanochat.chat has it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": [part.model_dump(exclude_none=True) for part in self.content]}


class Ask(BaseModel):
    """The body of POST /chat/completions, the published form."""

    model_config = ConfigDict(extra="ignore")
    messages: list[Message]
    temperature: Number | None = None
    max_tokens: StrictInt | None = None
    top_k: StrictInt | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None

    def problems(self) -> list[str]:
        """Everything that is out of bounds, a sentence each."""
        rules = (
            ("temperature", self.temperature, 0, MAX_TEMPERATURE),
            ("top_k", self.top_k, 0, MAX_TOP_K),
            ("max_tokens", self.max_tokens, 1, MAX_TOKENS),
        )
        wrong = [
            f"{name} must be {low} to {high}." for name, x, low, high in rules if x is not None and not low <= x <= high
        ]
        return wrong + self._message_problems()

    def _message_problems(self) -> list[str]:
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            return [f"a conversation must have 1 to {MAX_MESSAGES} messages."]
        wrong = []
        for i, message in enumerate(self.messages, 1):
            if not message.size():
                wrong.append(f"message {i} is empty.")
            if message.role != "assistant" and message.size() > MAX_MESSAGE_CHARS:
                wrong.append(f"message {i} is longer than {MAX_MESSAGE_CHARS} characters.")
            if not isinstance(message.content, str) and len(message.content) > MAX_PARTS:
                wrong.append(f"message {i} has more than {MAX_PARTS} parts.")
        if sum(message.size() for message in self.messages) > MAX_CHARS:
            wrong.append(f"the messages together are longer than {MAX_CHARS} characters.")
        return wrong[:10]

    def check(self) -> list[dict[str, Any]]:
        """The messages, ready for nanochat.chat. UserError: out of bounds, or no conversation that the user ended."""
        refuse(self.problems())
        messages = [message.plain() for message in self.messages]
        chat.check({"messages": messages})
        if messages[-1]["role"] != "user":
            raise UserError("The last message must be the user's.")
        return messages

    def sampling(self, default: Sampling) -> Sampling:
        """Its parameters; what it leaves out is the server's."""
        return Sampling(
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_k=default.top_k if self.top_k is None else self.top_k,
            top_p=default.top_p if self.top_p is None else self.top_p,
            min_p=default.min_p if self.min_p is None else self.min_p,
            seed=self.seed,
            max_tokens=self.limit() or default.max_tokens,
            stop=self.stops(),
        )

    def limit(self) -> int | None:
        """The longest reply asked for, tokens."""
        return self.max_tokens

    def stops(self) -> tuple[str, ...]:
        """The strings that end a reply."""
        return ()


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False


class OpenAIAsk(Ask):
    """The body of POST /v1/chat/completions: OpenAI's, with our top_k and min_p. What we cannot do is refused."""

    model: StrictStr | None = None
    n: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    tools: list[Any] | None = None

    def problems(self) -> list[str]:
        """As for Ask, and what is OpenAI's alone."""
        wrong = super().problems()
        if self.n is not None and not 1 <= self.n <= MAX_N:
            wrong.append(f"n must be 1 to {MAX_N}.")
        if self.max_completion_tokens is not None and not 1 <= self.max_completion_tokens <= MAX_TOKENS:
            wrong.append(f"max_completion_tokens must be 1 to {MAX_TOKENS}.")
        if self.logprobs or self.tools:
            wrong.append("logprobs and tools are not offered by this server.")
        return wrong

    def limit(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    def stops(self) -> tuple[str, ...]:
        """One string or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
