"""What clients may ask: the request bodies, every number bounded, and their way to messages and a Sampling.

A body of wrong types is refused by pydantic (422, or 400 in OpenAI's form under /v1), a wrong value by `check` (400).
The bounds stand in the OpenAPI schema too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, StrictBool, StrictInt, StrictStr

from nanochat import chat
from nanochat.errors import UserError, refuse
from nanochat.sampling import MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS, Sampling

MAX_BODY = 1 << 20  # bytes
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8000  # of what a user writes; a reply may be longer, and comes back in the next request
MAX_CHARS = 32000  # of all messages, or prompts, together
MAX_PARTS = 100  # of one message
MAX_TOKENS = 4096
MAX_N = 8  # replies to one prompt
MAX_PROMPTS = 16  # of one request for completions
MAX_TEMPERATURE, MAX_TOP_K = 2.0, 200
MAX_SEED = 2**63 - 1
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


def told(kind: Any, low: float, high: float) -> Any:
    """A type whose bounds the schema tells and `check` enforces, so that a wrong value is a sentence and a 400."""
    return Annotated[kind, Field(json_schema_extra={"minimum": low, "maximum": high})]


class AtOnce(FailFast):
    """pydantic's FailFast, able to stand in a union."""

    __hash__ = object.__hash__


def few(kind: Any, most: int) -> Any:
    """A list that is given up at its first fault or its end: a fault for each of 300,000 items would take a minute."""
    return Annotated[list[kind], Field(max_length=most), AtOnce()]


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = told(Number, 0, 1)
Temperature = told(Number, 0, MAX_TEMPERATURE)
Length = told(StrictInt, 1, MAX_TOKENS)
Seed = told(StrictInt, 0, MAX_SEED)


class Body(BaseModel):
    """What all bodies share: an unknown field is ignored."""

    model_config = ConfigDict(extra="ignore")


class Part(Body):
    """A piece of a message: text, or a calculator call and its answer. `ids` as the server gave them, if kept."""

    type: Literal["text", "python", "python_output"]
    text: StrictStr
    ids: few(StrictInt, 2 * MAX_TOKENS) | None = None


class Message(Body):
    """One message of a conversation. `parts`: a reply as this server gave it, used if it says what `content` says."""

    role: StrictStr
    content: StrictStr | few(Part, 4 * MAX_PARTS)
    parts: few(Part, 4 * MAX_PARTS) | None = None

    def size(self) -> int:
        """Its characters."""
        return max(len(self.words()), sum(len(part.text) for part in self.pieces()))

    def pieces(self) -> list[Part]:
        """Its parts; none if it is a string."""
        if isinstance(self.content, list):
            return self.content
        same = self.parts and "".join(part.text for part in self.parts if part.type == "text") == self.content
        return self.parts if same and self.role == "assistant" else []

    def words(self) -> str:
        """Its content, if that is a string."""
        return self.content if isinstance(self.content, str) else ""

    def plain(self) -> dict[str, Any]:
        """The message as nanochat.chat has it."""
        role = "system" if self.role == "developer" else self.role
        parts = self.pieces()
        return {"role": role, "content": [p.model_dump(exclude_none=True) for p in parts] if parts else self.content}


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages, ready for nanochat.chat. UserError: out of bounds, or no conversation that the user ended."""
    refuse(_message_problems(messages, [message.size() for message in messages]))
    plain = [message.plain() for message in messages]
    chat.check({"messages": plain})
    if plain[-1]["role"] != "user":
        raise UserError("The last message must be the user's.")
    return plain


def _message_problems(messages: list[Message], sizes: list[int]) -> list[str]:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        return [f"a conversation must have 1 to {MAX_MESSAGES} messages."]
    wrong = []
    for i, (message, size) in enumerate(zip(messages, sizes), 1):
        if len(message.role) > 20:
            wrong.append(f"message {i} has an unknown role.")  # and not its name: an error is short
        if not size:
            wrong.append(f"message {i} is empty.")
        if message.role != "assistant" and size > MAX_MESSAGE_CHARS:
            wrong.append(f"message {i} is longer than {MAX_MESSAGE_CHARS} characters.")
        if len(message.pieces()) > MAX_PARTS:
            wrong.append(f"message {i} has more than {MAX_PARTS} parts.")
    if sum(sizes) > MAX_CHARS:
        wrong.append(f"the messages together are longer than {MAX_CHARS} characters.")
    return wrong[:10]


class Draw(Body):
    """How a reply is drawn: what every kind of request may say."""

    model: StrictStr | None = None
    temperature: Temperature | None = None
    max_tokens: Length | None = None
    top_k: told(StrictInt, 0, MAX_TOP_K) | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    stop: StrictStr | few(StrictStr, 1000) | None = None

    def problems(self) -> list[str]:
        """Everything that is out of bounds, a sentence each."""
        rules = [
            ("temperature", self.temperature, 0, MAX_TEMPERATURE),
            ("top_k", self.top_k, 0, MAX_TOP_K),
            ("min_p", self.min_p, 0, 1),
            ("seed", self.seed, 0, MAX_SEED),
            *self.bounds(),
        ]
        wrong = [f"{name} must be {low} to {high}." for name, x, low, high in rules if not _within(x, low, high)]
        if self.top_p is not None and not 0 < self.top_p <= 1:
            wrong.append("top_p must be above 0 and at most 1.")
        stops = self.stops()
        if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            wrong.append(f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters.")
        return wrong

    def bounds(self) -> list[tuple[str, float | None, float, float]]:
        """Further (name, value, least, most)."""
        return [("max_tokens", self.max_tokens, 1, MAX_TOKENS)]

    def limit(self) -> int | None:
        """The longest reply asked for, tokens."""
        return self.max_tokens

    def stops(self) -> tuple[str, ...]:
        """The strings that end a reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, default: Sampling, **more: Any) -> Sampling:
        """Its parameters; what it leaves out is the server's. UserError: out of bounds."""
        refuse(self.problems())
        return Sampling(
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_k=default.top_k if self.top_k is None else self.top_k,
            top_p=default.top_p if self.top_p is None else self.top_p,
            min_p=default.min_p if self.min_p is None else self.min_p,
            seed=self.seed,
            max_tokens=self.limit() or default.max_tokens,
            stop=self.stops(),
            **more,
        )


def _within(x: float | None, low: float, high: float) -> bool:
    return x is None or low <= x <= high


class Ask(Draw):
    """The body of POST /chat/completions, the published form, with what our page asks besides."""

    messages: few(Message, 4 * MAX_MESSAGES)
    logprobs: told(StrictInt, 0, MAX_TOP_LOGPROBS) = 0  # so many alternatives come with every token
    html: StrictBool = False  # the reply also as safe HTML, block by block

    def bounds(self):
        """The published ones and ours."""
        return [*super().bounds(), ("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)]


class RenderAsk(Body):
    """The body of POST /render: messages to show as safe HTML."""

    messages: few(few(Part, 4 * MAX_PARTS), 4 * MAX_MESSAGES)

    def check(self) -> list[list[dict]]:
        """Their parts as dicts. UserError: too much at once."""
        size = sum(len(part.text) for parts in self.messages for part in parts)
        if len(self.messages) > MAX_MESSAGES or size > MAX_CHARS or any(len(p) > MAX_PARTS for p in self.messages):
            raise UserError(f"At most {MAX_MESSAGES} messages and {MAX_CHARS} characters can be shown at once.")
        return [[{"type": part.type, "text": whole(part.text)} for part in parts] for parts in self.messages]


def whole(text: str) -> str:
    """Text that can be sent: JSON may hold half a character (a lone surrogate), UTF-8 can't."""
    return text.encode("utf-8", "replace").decode()


# -- OpenAI's forms ---------------------------------------------------------------------------------------------------


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: StrictBool = False


class OpenAIDraw(Draw):
    """What OpenAI's two forms share. What would change the answer and we cannot do is refused, not ignored."""

    n: told(StrictInt, 1, MAX_N) | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: told(Number, 0, 0) | None = None
    presence_penalty: told(Number, 0, 0) | None = None
    logit_bias: dict[str, Any] | None = None

    def problems(self) -> list[str]:
        """As for all, and what is OpenAI's."""
        asked = {"logit_bias": self.logit_bias, **self.refused()}
        asked |= {"frequency_penalty": self.frequency_penalty, "presence_penalty": self.presence_penalty}
        return super().problems() + [f"{name} is not offered by this server." for name, x in asked.items() if x]

    def bounds(self):
        """With n."""
        return [*super().bounds(), ("n", self.n, 1, MAX_N)]

    def refused(self) -> dict[str, Any]:
        """Further things that may only be absent or empty."""
        return {}

    @property
    def usage(self) -> bool:
        """Whether a stream ends with its count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatAsk(OpenAIDraw):
    """The body of POST /v1/chat/completions: OpenAI's, with our top_k and min_p."""

    messages: few(Message, 4 * MAX_MESSAGES)
    max_completion_tokens: Length | None = None
    logprobs: StrictBool | None = None
    top_logprobs: told(StrictInt, 0, MAX_TOP_LOGPROBS) | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def problems(self) -> list[str]:
        """As for all, and that alternatives come with logprobs only."""
        extra = ["top_logprobs needs logprobs to be true."] if self.top_logprobs and not self.logprobs else []
        return super().problems() + extra

    def bounds(self):
        """With the newer name of max_tokens."""
        longest = ("max_completion_tokens", self.max_completion_tokens, 1, MAX_TOKENS)
        return [*super().bounds(), longest, ("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)]

    def refused(self) -> dict[str, Any]:
        """Tools of the client's and forms of the answer."""
        form = (self.response_format or {}).get("type", "text")
        return {"tools": self.tools, "functions": self.functions, "response_format": form != "text"}

    def limit(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens


class CompletionAsk(OpenAIDraw):
    """The body of POST /v1/completions: text, or token ids, to be continued."""

    prompt: (
        StrictStr | few(StrictStr, MAX_CHARS) | few(StrictInt, MAX_CHARS) | few(few(StrictInt, MAX_CHARS), MAX_CHARS)
    )
    max_tokens: told(StrictInt, 0, MAX_TOKENS) | None = None
    echo: StrictBool | None = None
    logprobs: told(StrictInt, 0, MAX_TOP_LOGPROBS) | None = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None

    def problems(self) -> list[str]:
        """As for all, and the prompts."""
        prompts, wrong = self.prompts(), super().problems()
        if not 1 <= len(prompts) <= MAX_PROMPTS or not all(prompts):
            wrong.append(f"prompt must be 1 to {MAX_PROMPTS} texts or lists of token ids, none of them empty.")
        if sum(map(len, prompts)) > MAX_CHARS:
            wrong.append(f"the prompts together are longer than {MAX_CHARS} characters or tokens.")
        if any(not isinstance(prompt, str) and min(prompt, default=0) < 0 for prompt in prompts):
            wrong.append("a token id of a prompt is negative.")
        if self.max_tokens == 0 and not self.echo:
            wrong.append("max_tokens may be 0 only with echo.")
        return wrong

    def bounds(self):
        """0 tokens are allowed: only the prompt is scored."""
        length = ("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        return [length, ("n", self.n, 1, MAX_N), ("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)]

    def refused(self) -> dict[str, Any]:
        """The best of several, and filling in."""
        return {"best_of": self.best_of not in (None, self.n or 1), "suffix": self.suffix}

    def prompts(self) -> list[str | list[int]]:
        """Each a text or a list of ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)

    def limit(self) -> int:
        """At least one token is made, even where none is shown."""
        return max(1, COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens)
