// How a message looks. Text of users is only ever text; HTML comes from the server's renderer alone, which sanitizes it.

const policy = window.trustedTypes ? window.trustedTypes.createPolicy("nanochat", { createHTML: (text) => text }) : null;

export function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

export function button(label, onclick, props = {}) {
  return make("button", { type: "button", className: "quiet", textContent: label, onclick, ...props });
}

export async function copy(text, from) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else fallback(text);
    flash(from, "Copied");
  } catch { flash(from, "Not allowed"); }
}

function fallback(text) {               // without https, browsers offer no clipboard
  const area = make("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function flash(node, words) {
  if (!node) return;
  const before = node.dataset.label || node.textContent;
  node.dataset.label = before;
  node.textContent = words;
  setTimeout(() => { node.textContent = before; }, 1200);
}

// A message: body, and under it what can be done with it. `act` has the handlers.
export function bubble(message, act) {
  const who = make("h2", { className: "unseen", textContent: message.role === "user" ? "You" : "nanochat" });
  const body = make("div", { className: "body" });
  const tools = make("div", { className: "tools" });
  const article = make("article", { className: message.role }, who, body, tools);
  if (message.role === "user") body.textContent = message.content;
  else plain(body, message);
  tools.append(button("Copy", (e) => copy(message.content, e.currentTarget), { className: "quiet copy-message" }));
  if (message.role === "user") tools.append(button("Edit", () => act.edit(message, article)));
  else {
    tools.append(button("Regenerate", () => act.again(message)));
    if (act.tokens(message)) tools.append(button("Certainty", (e) => act.certainty(message, article, e.currentTarget), { ariaPressed: "false" }));
  }
  tools.append(make("span", { className: "note", textContent: [message.note, message.model].filter(Boolean).join(" · ") }));
  return article;
}

// A reply whose HTML has not come: its words, calculator steps in brackets.
export function plain(body, message) {
  body.classList.add("plain");
  body.replaceChildren();
  for (const part of message.parts || [{ type: "text", text: message.content }]) {
    if (part.type === "text") body.append(part.text);
    else if (part.type === "python") body.append(make("code", { textContent: part.text }));
    else body.append(" = ", make("code", { textContent: part.text }), " ");
  }
}

// Put blocks of the server's HTML in place of those from the `from`-th on.
export function blocks(body, html, from) {
  if (body.classList.contains("plain")) { body.classList.remove("plain"); body.replaceChildren(); }
  while (body.children.length > from) body.lastElementChild.remove();
  for (const text of html) {
    const block = make("div", { className: "block" });
    block.innerHTML = policy ? policy.createHTML(text) : text;
    decorate(block);
    body.append(block);
  }
}

function decorate(block) {
  for (const pre of block.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const bar = make("div", { className: "bar" }, make("span", { textContent: code.className || "code" }));
    bar.append(button("Copy", (e) => copy(code.textContent, e.currentTarget), { className: "quiet copy-code" }));
    pre.tabIndex = 0;
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", "Code");
    const frame = make("div", { className: "code" });
    pre.replaceWith(frame);
    frame.append(bar, pre);
  }
  for (const table of block.querySelectorAll("table")) {
    const frame = make("div", { className: "scroll", tabIndex: 0 });
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", "Table");
    table.replaceWith(frame);
    frame.append(table);
  }
}

// A calculator step opens and closes.
export function toggleStep(event) {
  const head = event.target.closest(".step > button");
  if (!head) return;
  const open = head.getAttribute("aria-expanded") !== "true";
  head.setAttribute("aria-expanded", String(open));
  head.nextElementSibling.hidden = !open;
}

// The box that edits a message in its place.
export function editor(message, article, save, cancel) {
  const area = make("textarea", { value: message.content, rows: Math.min(12, message.content.split("\n").length + 1), maxLength: 8000 });
  area.setAttribute("aria-label", "Edit your message");
  const done = () => { const text = area.value.trim(); if (text) save(text); };
  const form = make("form", { className: "editor" }, area,
    make("div", { className: "row end" }, button("Cancel", cancel), make("button", { type: "submit", textContent: "Send again" })));
  form.addEventListener("submit", (e) => { e.preventDefault(); done(); });
  area.addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); done(); }
    if (e.key === "Escape") { e.preventDefault(); e.stopPropagation(); cancel(); }
  });
  article.replaceChildren(article.querySelector("h2"), form);
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}
