// The server as the page sees it: models, a stream of events, HTML of old replies. Failures are sentences.

import { settings } from "./store.js";

const MOST_CHARACTERS = 24000, MOST_MESSAGES = 400;   // the server takes 32000 and 500

export class ServerError extends Error {
  constructor(message, seconds = 0) { super(message); this.seconds = seconds; }
}

function headers() {
  const key = settings().key.trim();
  return key ? { "content-type": "application/json", authorization: "Bearer " + key } : { "content-type": "application/json" };
}

async function call(path, body, signal) {
  let response;
  try {
    response = await fetch(path, body ? { method: "POST", signal, headers: headers(), body: JSON.stringify(body) } : { headers: headers(), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server can't be reached. Is it running?");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const words = response.status === 401 ? "This server needs an API key: enter it in the settings." : answer.detail;
  throw new ServerError(words || "The server answered " + response.status + ".", Number(response.headers.get("retry-after")) || 0);
}

let known = [];

export async function models() {
  known = (await (await call("/v1/models")).json()).data.map((model) => model.id);
  return known;
}

export function severalModels() { return known.length > 1; }

// The events of a reply, each whole line once.
export async function* reply(chat, model, signal) {
  const { body, dropped } = ask(chat, model);
  const response = await call("/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const event = JSON.parse(line.slice(6));
        if (event.done) { ended = true; event.dropped += dropped; }
        yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection was lost.");
  }
  if (!ended) throw new ServerError("The connection was lost.");
}

// HTML of replies, a list of blocks each; several requests when there is much of it.
export async function render(messages) {
  const made = [];
  for (let i = 0; i < messages.length;) {
    let size = 0, end = i;
    while (end < messages.length && end - i < 50 && (end === i || size + length(messages[end]) < MOST_CHARACTERS)) size += length(messages[end++]);
    const parts = messages.slice(i, end).map((m) => m.parts.map((p) => ({ type: p.type, text: p.text })));
    made.push(...(await (await call("/render", { messages: parts })).json()).messages);
    i = end;
  }
  return made;
}

function length(message) {
  return (message.parts || []).reduce((sum, part) => sum + part.text.length, 0) || message.content.length;
}

function ask(chat, model) {
  const messages = [];                  // turns alternate: a message without an answer is joined to the next
  for (const m of chat.messages) {
    const last = messages[messages.length - 1];
    if (m.role === "user" && last && last.role === "user") last.content += "\n\n" + m.content;
    else messages.push({ role: m.role, content: m.parts || m.content });
  }
  const kept = settings();
  let dropped = 0;
  const sizes = messages.map((m) => (typeof m.content === "string" ? m.content.length : m.content.reduce((n, p) => n + p.text.length, 0)));
  let size = sizes.reduce((a, b) => a + b, 0);
  while (messages.length - dropped > 2 && (size > MOST_CHARACTERS || messages.length - dropped > MOST_MESSAGES)) {
    size -= sizes[dropped] + sizes[dropped + 1];
    dropped += 2;
  }
  const body = { messages: messages.slice(dropped), html: true };
  if (kept.system && kept.system.trim()) body.messages.unshift({ role: "system", content: kept.system.trim() });
  if (model) body.model = model;
  if (kept.certainty !== false) body.logprobs = 5;
  for (const name of ["temperature", "top_k", "top_p", "min_p", "max_tokens", "seed"]) {
    if (kept[name] !== undefined && kept[name] !== "") body[name] = Number(kept[name]);
  }
  return { body, dropped };
}
