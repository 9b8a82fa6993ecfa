"""OpenAI's endpoints: /v1/chat/completions, /v1/completions and /v1/models, in the shapes that OpenAI's clients expect.

Beyond OpenAI: top_k and min_p; the header x-dropped-messages (oldest messages that did not fit the context); and the
calculator's steps, which are no content: a whole message has `parts`, a stream has deltas with `part` and at the end
`parts`. A message sent back with its `parts` is read exactly as it was written.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from nanochat.errors import UserError
from nanochat.serve import asks
from nanochat.serve.desk import FAILED, Desk, EventStream, Failed, event
from nanochat.serve.pool import End, Item, Ticket

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": "OpenAI's error object"} for code in (400, 404, 429, 503)
}


def add_openai(app: FastAPI, desk: Desk) -> None:
    """The four endpoints."""
    born = int(time.time())

    def card(name: str) -> dict:
        return {"id": name, "object": "model", "created": born, "owned_by": "nanochat"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card(name) for name in desk.pool.models]}

    @app.get("/v1/models/{name}", responses={404: ERRORS[404]})
    async def model(name: str):
        return card(desk.model(name))

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(ask: asks.ChatAsk, request: Request):
        return await complete_chat(desk, ask, request)

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(ask: asks.CompletionAsk, request: Request):
        return await complete_text(desk, ask, request)


async def complete_chat(desk: Desk, ask: asks.ChatAsk, request: Request):
    """Answer a conversation, streamed or whole."""
    model = desk.model(ask.model)
    wants = {"logprobs": bool(ask.logprobs), "top_logprobs": ask.top_logprobs or 0}
    sampling = ask.sampling(desk.settings.sampling, **wants)
    prompt = await desk.prompt(model, asks.conversation(ask.messages), sampling.max_tokens)
    ticket = desk.open_ticket(request, model, [prompt.ids], sampling, ask.n or 1)
    items, rest = await desk.first(ticket, request)
    head, headers = heading("chatcmpl", model), {"x-dropped-messages": str(prompt.dropped)}
    if ask.stream:
        form = ChatForm(head, bool(ask.logprobs), ask.usage)
        return EventStream(chunks(form, ticket, items, rest), headers)
    choices = [whole_chat(reply, bool(ask.logprobs)) for reply in await gather(ticket, items, rest)]
    body = {**head, "object": "chat.completion", "choices": choices, "usage": usage_of(ticket)}
    return JSONResponse(body, headers=headers)


async def complete_text(desk: Desk, ask: asks.CompletionAsk, request: Request):
    """Continue texts, streamed or whole."""
    model = desk.model(ask.model)
    wants = {"logprobs": ask.logprobs is not None, "top_logprobs": ask.logprobs or 0}
    scored = bool(ask.echo and ask.logprobs is not None)
    sampling = ask.sampling(desk.settings.sampling, prompt_logprobs=scored, **wants)
    if scored and ask.stream:
        raise UserError("echo with logprobs can't be streamed: leave out stream.")
    given = ask.prompts()  # of some texts, 32,000 characters take the tokenizer half a second: not in the event loop
    ids = await asyncio.to_thread(lambda: [encode(desk.tokenizer, prompt) for prompt in given])
    if (highest := max(map(max, ids))) >= desk.tokenizer.vocab_size:  # before any prompt is begun
        raise UserError(f"Token id {highest} of a prompt is beyond the vocabulary of {desk.tokenizer.vocab_size}.")
    ticket = desk.open_ticket(request, model, ids, sampling, ask.n or 1)
    ticket.mute = ask.max_tokens == 0
    items, rest = await desk.first(ticket, request)
    texts = [desk.tokenizer.decode(shown_prompt(desk.tokenizer, prompt)) if ask.echo else "" for prompt in ids]
    head = heading("cmpl", model)
    if ask.stream:
        form = TextForm(head, texts, ask.n or 1, ask.logprobs is not None, ask.usage)
        return EventStream(chunks(form, ticket, items, rest))
    replies = await gather(ticket, items, rest)
    choices = [whole_text(reply, texts[reply.index // ticket.n], ask, desk.tokenizer) for reply in replies]
    return JSONResponse({**head, "object": "text_completion", "choices": choices, "usage": usage_of(ticket)})


def encode(tokenizer, prompt: str | list[int]) -> list[int]:
    """A text begins with bos, as every document does; ids are taken as they are."""
    return tokenizer.encode(prompt, prepend="<|bos|>") if isinstance(prompt, str) else prompt


def shown_prompt(tokenizer, ids: list[int]) -> list[int]:
    """A prompt without the bos that stands before it."""
    return ids[1:] if ids[0] == tokenizer.bos else ids


def heading(kind: str, model: str) -> dict:
    """What every object of one answer begins with."""
    return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def finish_reason(end: End) -> str:
    """OpenAI's word for why a reply ended."""
    return "stop" if end.finish == "stop" else "length"


def usage_of(ticket: Ticket) -> dict:
    """OpenAI's count of tokens: each prompt once."""
    prompt = sum(map(len, ticket.prompts))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": ticket.tokens,
        "total_tokens": prompt + ticket.tokens,
        "prompt_tokens_details": {"cached_tokens": min(prompt, ticket.cached)},
    }


# -- whole ------------------------------------------------------------------------------------------------------------


class Reply:
    """A finished reply."""

    def __init__(self, index: int):
        self.index = index
        self.pieces: list[list[str]] = []
        self.tokens: list[list] = []
        self.end = End("error")

    def text(self, *kinds: str) -> str:
        """Its words of these kinds."""
        return "".join(text for kind, text in self.pieces if kind in kinds)


async def gather(ticket: Ticket, items: list[Item], rest: AsyncIterator[list[Item]]) -> list[Reply]:
    """Wait for every reply. Failed: one of them did."""
    replies = [Reply(i) for i in range(ticket.replies)]
    try:
        while items:
            for item in items:
                reply = replies[item.reply]
                reply.pieces += item.pieces
                reply.tokens += item.tokens
                reply.end = item.end or reply.end
            items = await anext(rest, [])
    finally:
        await rest.aclose()
    if any(reply.end.finish == "error" for reply in replies):
        raise Failed(FAILED)
    return replies


def whole_chat(reply: Reply, logprobs: bool) -> dict:
    """A choice of a chat completion."""
    message = {"role": "assistant", "content": reply.text("text"), "refusal": None, "parts": reply.end.parts}
    law = chat_logprobs(reply.tokens) if logprobs else None
    return {"index": reply.index, "message": message, "logprobs": law, "finish_reason": finish_reason(reply.end)}


def whole_text(reply: Reply, echoed: str, ask: asks.CompletionAsk, tokenizer) -> dict:
    """A choice of a completion; `echoed` is the prompt to repeat."""
    text, tokens = reply.text("text", "python", "python_output"), reply.tokens
    law = None
    if ask.logprobs is not None:
        prompt = reply.end.prompt or []
        prompt = prompt[1:] if prompt and prompt[0][0] == "<|bos|>" else prompt
        law = text_logprobs(prompt + tokens)
    return {"text": echoed + text, "index": reply.index, "logprobs": law, "finish_reason": finish_reason(reply.end)}


def chat_logprobs(tokens: list[list]) -> dict:
    """Token records as chat completions have them; what a tool forced had no choice: 0."""
    content = []
    for text, data, logprob, top in tokens:
        alternatives = [{"token": t, "bytes": b, "logprob": value} for t, b, value in top]
        content.append({"token": text, "bytes": data, "logprob": logprob or 0.0, "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def text_logprobs(tokens: list[list], offset: int = 0) -> dict:
    """Token records as completions have them."""
    law: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for text, _, logprob, top in tokens:
        law["tokens"].append(text)
        law["token_logprobs"].append(logprob)
        law["top_logprobs"].append({t: value for t, _, value in top} or None)
        law["text_offset"].append(offset)
        offset += len(text)
    return law


# -- streamed ---------------------------------------------------------------------------------------------------------


class ChatForm:
    """How a chat completion is streamed."""

    def __init__(self, head: dict, logprobs: bool, usage: bool):
        self.head = {**head, "object": "chat.completion.chunk"}
        self.logprobs, self.usage = logprobs, usage

    def begin(self, reply: int) -> list[dict]:
        """A reply's first choice."""
        return [self._choice(reply, {"role": "assistant", "content": "", "refusal": None})]

    def item(self, item: Item) -> list[dict]:
        """The choices of some news."""
        choices = []
        for kind, text in item.pieces:
            delta = {"content": text} if kind == "text" else {"part": {"type": kind, "text": text}}
            choices.append(self._choice(item.reply, delta))
        if self.logprobs and item.tokens:
            choices = choices or [self._choice(item.reply, {"content": ""})]
            choices[0]["logprobs"] = chat_logprobs(item.tokens)
        return choices

    def end(self, reply: int, end: End) -> list[dict]:
        """A reply's last choice."""
        return [{**self._choice(reply, {"parts": end.parts}), "finish_reason": finish_reason(end)}]

    def _choice(self, index: int, delta: dict) -> dict:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class TextForm:
    """How a completion is streamed; echo: the prompts' texts come first."""

    def __init__(self, head: dict, echoes: list[str], n: int, logprobs: bool, usage: bool):
        self.head = {**head, "object": "text_completion"}
        self.echoes, self.n, self.logprobs, self.usage = echoes, n, logprobs, usage
        self.offsets: dict[int, int] = {}

    def begin(self, reply: int) -> list[dict]:
        """The prompt, if asked for."""
        echo = self.echoes[reply // self.n]
        self.offsets[reply] = len(echo)
        return [self._choice(reply, echo)] if echo else []

    def item(self, item: Item) -> list[dict]:
        """The choices of some news."""
        text = "".join(text for _, text in item.pieces)
        choice = self._choice(item.reply, text)
        if self.logprobs and item.tokens:
            choice["logprobs"] = text_logprobs(item.tokens, self.offsets[item.reply])
            self.offsets[item.reply] += sum(len(record[0]) for record in item.tokens)
        return [choice] if text or choice["logprobs"] else []

    def end(self, reply: int, end: End) -> list[dict]:
        """A reply's last choice."""
        return [{**self._choice(reply, ""), "finish_reason": finish_reason(end)}]

    def _choice(self, index: int, text: str) -> dict:
        return {"text": text, "index": index, "logprobs": None, "finish_reason": None}


async def chunks(
    form: ChatForm | TextForm, ticket: Ticket, items: list[Item], rest: AsyncIterator[list[Item]]
) -> AsyncIterator[str]:
    """An answer as OpenAI streams it."""
    nothing = {"usage": None} if form.usage else {}

    def pack(choices: list[dict]) -> str:
        return "".join(event({**form.head, "choices": [choice], **nothing}) for choice in choices)

    try:
        if begun := "".join(pack(form.begin(i)) for i in range(ticket.replies)):
            yield begun
        while items:
            said = ""
            for item in items:
                said += pack(form.item(item))
                if item.end and item.end.finish == "error":
                    error = {"message": FAILED, "type": "server_error", "param": None, "code": None}
                    said += event({"error": error})
                elif item.end:
                    said += pack(form.end(item.reply, item.end))
            if said:
                yield said
            items = await anext(rest, [])
        if form.usage:
            yield event({**form.head, "choices": [], "usage": usage_of(ticket)})
        yield "data: [DONE]\n\n"
    finally:
        await rest.aclose()
