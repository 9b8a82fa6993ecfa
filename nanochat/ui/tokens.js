// A reply as its tokens: each tinted by its probability; hovering, or the arrow keys, show it and the alternatives.

import { make } from "./view.js";

const LEVELS = [0.9, 0.6, 0.3, 0.1];    // at least so probable: level 0, 1, 2, 3; below: 4

const visible = (text) => text.replaceAll("\n", "⏎\n").replaceAll(" ", " ");
const percent = (logprob) => (logprob === null ? "forced" : (100 * Math.exp(logprob)).toFixed(1) + " %");

export function certainty(body, tokens) {
  const box = make("div", { className: "tokens", tabIndex: 0 });
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "Tokens of the reply; arrow keys show the probability of each");
  tokens.forEach(([text, logprob, top], i) => {
    const p = logprob === null ? 1 : Math.exp(logprob);
    const level = LEVELS.findIndex((least) => p >= least);
    const node = make("span", { textContent: visible(text), className: "token t" + (level < 0 ? 4 : level), id: "token-" + i });
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", "false");
    node.setAttribute("aria-label", label(text, logprob, top));
    box.append(node);
  });
  let at = -1;
  const show = (i) => {
    if (at >= 0) box.children[at].setAttribute("aria-selected", "false");
    at = i;
    if (i < 0) { tip(null); box.removeAttribute("aria-activedescendant"); return; }
    box.children[i].setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", box.children[i].id);
    tip(box.children[i], tokens[i]);
  };
  box.addEventListener("pointerover", (e) => { if (e.target.classList.contains("token")) show([...box.children].indexOf(e.target)); });
  box.addEventListener("pointerleave", () => show(-1));
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[e.key];
    if (step === undefined) return;
    e.preventDefault();
    show(Math.max(0, Math.min(tokens.length - 1, at + step)));
  });
  body.replaceChildren(box);
}

function label(text, logprob, top) {
  const others = top.filter(([t]) => t !== text).slice(0, 3).map(([t, p]) => JSON.stringify(t) + " " + percent(p));
  return JSON.stringify(text) + ", " + percent(logprob) + (others.length ? "; instead: " + others.join(", ") : "");
}

function tip(token, record) {
  const box = document.getElementById("tip");
  box.hidden = !token;
  if (!token) return;
  const [text, logprob, top] = record;
  const head = make("strong", { textContent: JSON.stringify(text) + "  " + percent(logprob) });
  const rows = top.map(([t, p]) => {
    const bar = make("meter", { min: 0, max: 1, value: Math.exp(p) });
    return make("div", { className: t === text ? "row chosen" : "row" }, make("code", { textContent: JSON.stringify(t) }), bar, make("span", { textContent: percent(p) }));
  });
  box.replaceChildren(head, ...(logprob === null ? [make("div", { textContent: "written by the calculator" })] : rows));
  const place = token.getBoundingClientRect(), size = box.getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, window.innerWidth - size.width - 8));
  const under = place.bottom + 6 + size.height < window.innerHeight;
  box.style.left = left + "px";
  box.style.top = (under ? place.bottom + 6 : Math.max(8, place.top - size.height - 6)) + "px";
}
