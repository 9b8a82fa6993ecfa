// The chat page: which chat is shown, the reply being made, and what keys and buttons do.

import * as server from "./server.js";
import * as store from "./store.js";
import { certainty } from "./tokens.js";
import * as view from "./view.js";
import { dialogs } from "./dialogs.js";

const $ = (id) => document.getElementById(id);
const log = $("log"), words = $("words"), send = $("send");
const tokens = new WeakMap();           // message -> token records; for this visit only, they are large
const made = new WeakMap();             // message -> its blocks of HTML
const STARTS = ["What is 84 * 37?", "Why is the sky blue?", "Who are you?"];
let chat = store.blank();
let running = null;                     // {control, home} of the reply being made
let pinned = true;                      // follow the reply unless the reader scrolled up

// -- the list of chats ------------------------------------------------------------------------------------------------

function list() {
  const wanted = $("search").value.trim().toLowerCase(), all = store.chats();
  const found = all.filter((c) => !wanted || c.messages.some((m) => m.content.toLowerCase().includes(wanted)));
  $("chats").replaceChildren(...found.map(entry));
  $("nochats").hidden = found.length > 0 || !wanted;
  $("title").textContent = store.title(chat);
  document.title = chat.messages.length ? store.title(chat) + " - nanochat" : "nanochat";
}

function entry(c) {
  const name = store.title(c);
  const open = view.button(name, () => choose(store.load(c.id) || store.blank()), { className: "chat", title: name });
  if (c.id === chat.id) open.setAttribute("aria-current", "true");
  const remove = view.button("✕", () => drop(c), { className: "quiet icon", title: "Delete" });
  remove.setAttribute("aria-label", "Delete: " + name);
  const keep = view.button("⇩", () => download([c], name), { className: "quiet icon", title: "Export" });
  keep.setAttribute("aria-label", "Export: " + name);
  return view.make("li", {}, open, keep, remove);
}

function choose(next, focus = true) {
  stop();
  chat = next;
  history.replaceState(null, "", chat.messages.length ? "#" + chat.id : location.pathname);
  side(false);
  show();
  if (focus) words.focus();
}

function drop(c) {
  if (running && running.home.id === c.id) stop();
  store.drop(c);
  if (c.id === chat.id) choose(store.blank());
  else list();
  toast("Deleted “" + store.title(c).slice(0, 40) + "”", () => { store.save(c); list(); });
}

function download(chats, name) {
  const file = new Blob([JSON.stringify({ nanochat: 1, chats }, null, 1)], { type: "application/json" });
  const link = view.make("a", { href: URL.createObjectURL(file), download: "nanochat " + name.replace(/[^\p{L}\p{N} -]/gu, "").slice(0, 40) + ".json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

let toasting = 0;
function toast(text, undo) {
  const [span, button] = $("toast").children;
  span.textContent = text;
  button.hidden = !undo;
  button.onclick = () => { $("toast").hidden = true; undo(); };
  $("toast").hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => { $("toast").hidden = true; }, 8000);
}

// -- the conversation -------------------------------------------------------------------------------------------------

function save(c = chat) {
  c.updated = Date.now();
  if (!store.save(c)) toast("This browser keeps no history: its storage is full or off.");
  if (c === chat) history.replaceState(null, "", c.messages.length ? "#" + c.id : location.pathname);
  list();
}

const act = {
  edit(message, article) {
    view.editor(message, article, (text) => {
      stop();
      chat.messages.length = chat.messages.indexOf(message);
      chat.messages.push({ role: "user", content: text });
      save(); show(); answer();
    }, () => { show(false); words.focus(); });
  },
  again(message) {
    stop();
    chat.messages.length = chat.messages.indexOf(message);
    show(); answer();
  },
  tokens: (message) => tokens.get(message),
  certainty(message, article, button) {
    const on = button.getAttribute("aria-pressed") !== "true", body = article.querySelector(".body");
    button.setAttribute("aria-pressed", String(on));
    if (on) certainty(body, tokens.get(message));
    else paint(body, message);
  },
};

function paint(body, message) {
  if (made.has(message)) { body.replaceChildren(); view.blocks(body, made.get(message), 0); }
  else view.plain(body, message);
}

function show(toEnd = true) {
  log.replaceChildren();
  if (!chat.messages.length) {
    const starts = STARTS.map((text) => view.button(text, () => { words.value = text; submit(); }, { className: "" }));
    log.append(view.make("div", { className: "empty" }, view.make("p", { textContent: "Say hello to your own model." }),
      view.make("div", { className: "row starts" }, ...starts),
      view.make("p", { className: "hint", textContent: "Press ? for the shortcuts." })));
  }
  const articles = chat.messages.map((message) => view.bubble(message, act));
  log.append(...articles);
  chat.messages.forEach((message, i) => { if (made.has(message)) paint(articles[i].querySelector(".body"), message); });
  const last = chat.messages[chat.messages.length - 1];
  if (last && last.role === "user") {     // its reply failed, or the page was left before one came
    log.append(view.make("p", { className: "hint unanswered" }, "No reply yet. ", view.button("Ask again", retryLast, { className: "" })));
  }
  list();
  down(toEnd);
  renderOld();
}

// Replies from the browser's store have no HTML: ask the server. Without it they stay plain.
async function renderOld() {
  const home = chat, old = chat.messages.filter((m) => m.role === "assistant" && !made.has(m));
  if (!old.length) return;
  try {
    (await server.render(old)).forEach((html, i) => made.set(old[i], html));
  } catch { return; }
  if (home !== chat) return;
  [...log.querySelectorAll("article")].forEach((article, i) => {
    if (old.includes(chat.messages[i])) paint(article.querySelector(".body"), chat.messages[i]);
  });
  down();
}

function atEnd() { return log.scrollHeight - log.scrollTop - log.clientHeight < 60; }

let scrolled = 0;                       // where we have scrolled to; above it, the reader has
function down(force) {
  if (force) pinned = true;
  else if (log.scrollTop < scrolled - 4 && !atEnd()) pinned = false;
  if (pinned) log.scrollTop = log.scrollHeight;
  scrolled = log.scrollTop;
}

function submit() {
  const text = words.value.trim();
  if (!text || running) return;
  words.value = "";
  grow();
  chat.messages.push({ role: "user", content: text });
  save(); show(); answer();
}

function stop() {
  if (running) running.control.abort();
  running = null;
  busy(false);
}

// Make the reply to the last message of the chat.
async function answer() {
  stop();
  const turn = { control: new AbortController(), home: chat };
  running = turn;
  const message = { role: "assistant", content: "", parts: [] };
  const article = view.bubble(message, act), live = new Live(message, article);
  article.setAttribute("aria-busy", "true");
  log.querySelectorAll(".unanswered, .trouble").forEach((box) => box.remove());
  log.append(article);
  down(true); busy(true); status("nanochat is writing");
  let failed = null;
  try {
    for await (const event of server.reply(chat, $("model").value, turn.control.signal)) {
      live.take(event);
      if (!event.done && live.due()) { message.note = "interrupted"; keep(turn.home, message); store.save(turn.home); }
      down();
    }
    failed = live.failed;
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else { failed = error; message.note = "interrupted"; }
  }
  if (running === turn) { running = null; busy(false); }
  live.end();
  keep(turn.home, message);
  if (turn.home.messages.length && store.load(turn.home.id)) save(turn.home);
  if (turn.home !== chat) return;
  article.remove();
  if (turn.home.messages.includes(message)) {
    const whole = view.bubble(message, act);
    log.append(whole);
    paint(whole.querySelector(".body"), message);
  }
  status(failed ? "" : message.note === "stopped" ? "Stopped" : "The reply is complete");
  if (failed) trouble(failed);
  if (!made.has(message)) renderOld();
  down();
}

// A reply joins its chat as soon as it says anything.
function keep(home, message) {
  if (message.parts.some((part) => part.text) && !home.messages.includes(message)) home.messages.push(message);
}

// A reply while it grows.
class Live {
  constructor(message, article) {
    this.message = message;
    this.body = article.querySelector(".body");
    this.note = article.querySelector(".note");
    this.html = [];
    this.records = [];
    this.begun = this.saved = performance.now();
    this.first = 0;
    this.failed = null;
    this.body.classList.add("waiting");
    article.querySelectorAll(".tools button").forEach((button) => button.remove());
  }

  take(event) {
    const { message } = this;
    if (event.html) {
      this.html.splice(event.from, Infinity, ...event.html);
      view.blocks(this.body, event.html, event.from);
    } else if (event.done) this.done(event);
    else this.add(event);
    message.content = message.parts.filter((p) => p.type === "text").map((p) => p.text).join("");
    if (!this.html.length && message.parts.length) view.plain(this.body, message);
  }

  add(event) {
    this.first = this.first || performance.now();
    this.body.classList.remove("waiting");
    const parts = this.message.parts, kind = event.type || "text", last = parts[parts.length - 1];
    if (event.token && last && last.type === kind) last.text += event.token;
    else if (event.token) parts.push({ type: kind, text: event.token });
    if (event.tokens) this.records.push(...event.tokens);
    if (this.records.length > 8) this.note.textContent = this.rate(this.records.length);
  }

  done(event) {
    const { message } = this, notes = [];
    if (event.parts.length) message.parts = event.parts;
    if (event.finish === "length") notes.push("cut at the limit");
    if (event.finish === "deadline") notes.push("cut: it took too long");
    if (event.finish === "error" || event.finish === "closing") notes.push("interrupted");
    if (event.finish === "error") this.failed = new server.ServerError("The model failed.");
    if (event.finish === "closing") this.failed = new server.ServerError("The server is closing.");
    if (event.dropped) notes.push("the oldest " + event.dropped + " messages no longer fit");
    if (event.tokens > 8) notes.push(this.rate(event.tokens));
    message.note = notes.join(", ");
    if (server.severalModels()) message.model = $("model").selectedOptions[0].textContent;
    if (!this.failed) made.set(message, this.html);
  }

  rate(count) {
    return Math.round((1000 * (count - 1)) / (performance.now() - this.first)) + " tok/s";
  }

  due() {
    const now = performance.now(), yes = now - this.saved > 1000;
    if (yes) this.saved = now;
    return yes;
  }

  end() {
    this.body.classList.remove("waiting");
    if (this.records.length) tokens.set(this.message, this.records);
  }
}

// Ask once more; what a failed reply had said is put aside.
function retryLast() {
  const last = chat.messages[chat.messages.length - 1];
  if (last && last.role === "assistant") chat.messages.pop();
  show(); answer();
}

function trouble(error) {
  const retry = view.button("Try again", retryLast, { className: "" });
  const box = view.make("div", { className: "trouble", role: "alert" }, view.make("span", { textContent: error.message }), retry);
  log.append(box);
  if (error.seconds) {                  // the server said when to come back
    let left = Math.min(60, error.seconds);
    const tick = () => {
      retry.disabled = left > 0;
      retry.textContent = left > 0 ? "Try again in " + left + " s" : "Try again";
      if (left-- > 0) setTimeout(tick, 1000);
    };
    tick();
  }
  down(true);
}

// -- the frame --------------------------------------------------------------------------------------------------------

function busy(on) {
  document.body.classList.toggle("busy", on);
  send.setAttribute("aria-label", on ? "Stop" : "Send");
  send.title = on ? "Esc" : "Enter";
}

function status(text) { $("status").textContent = text; }

function grow() {
  words.style.height = "auto";
  words.style.height = words.scrollHeight + 2 + "px";
}

function side(open) {
  document.body.classList.toggle("open", open);
  $("shade").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
  if (open) $("fresh").focus();
}

async function listModels() {
  try {
    const names = await server.models(), before = store.settings().model;
    $("model").replaceChildren(...names.map((name) => view.make("option", { value: name, textContent: name.replace(/^nanochat-/, "") })));
    if (names.includes(before)) $("model").value = before;
  } catch (error) {
    if (!log.querySelector(".trouble") && !chat.messages.length) log.append(view.make("p", { className: "hint center", textContent: error.message }));
  }
}

function lastUser() {
  const articles = log.querySelectorAll("article.user");
  const messages = chat.messages.filter((m) => m.role === "user");
  if (messages.length) act.edit(messages[messages.length - 1], articles[articles.length - 1]);
}

function keys(e) {
  const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(e.target.tagName), inDialog = e.target.closest("dialog");
  const key = e.key.toLowerCase(), ctrl = e.ctrlKey || e.metaKey;
  const does = (what) => { e.preventDefault(); what(); };
  if (e.key === "Escape" && !inDialog) {
    if (document.body.classList.contains("open")) { side(false); $("menu").focus(); } else if (running) stop();
  } else if (ctrl && e.shiftKey && key === "o") does(() => choose(store.blank()));
  else if (ctrl && e.shiftKey && key === "c") does(() => { const all = log.querySelectorAll("article.assistant .copy-message"); if (all.length) all[all.length - 1].click(); });
  else if (ctrl && key === "k") does(() => { side(matchMedia("(max-width: 46rem)").matches); $("search").focus(); });
  else if (ctrl && key === ",") does(() => $("settings").showModal());
  else if (!typing && !inDialog && e.key === "/") does(() => words.focus());
  else if (!typing && !inDialog && e.key === "?") does(() => $("keys").showModal());
}

$("form").addEventListener("submit", (e) => { e.preventDefault(); if (running) stop(); else submit(); });
words.addEventListener("input", grow);
words.addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); submit(); }
  if (e.key === "ArrowUp" && !words.value && !running) { e.preventDefault(); lastUser(); }
});
log.addEventListener("scroll", () => {
  pinned = atEnd();
  $("latest").hidden = pinned;
});
log.addEventListener("click", view.toggleStep);
$("latest").addEventListener("click", () => { down(true); words.focus(); });
document.addEventListener("keydown", keys);
$("fresh").addEventListener("click", () => choose(store.blank()));
$("search").addEventListener("input", list);
$("menu").addEventListener("click", () => side(!document.body.classList.contains("open")));
$("hide").addEventListener("click", () => { side(false); $("menu").focus(); });
$("shade").addEventListener("click", () => side(false));
$("model").addEventListener("change", () => store.keep({ ...store.settings(), model: $("model").value }));
window.addEventListener("storage", (e) => { if (store.isChat(e.key) && !running) { const now = store.load(chat.id); if (now) { chat = now; show(false); } else list(); } });
window.addEventListener("pagehide", () => { if (running) store.save(running.home); });

dialogs({ download, toast, refresh: () => { choose(store.blank(), false); }, changed: listModels });
choose(store.load(location.hash.slice(1)) || store.chats()[0] || store.blank());
listModels();
