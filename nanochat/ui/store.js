// What the browser keeps: chats (one localStorage entry each, so a write is small) and settings. Nothing leaves it.

const CHAT = "nanochat.chat.", SETTINGS = "nanochat.settings", KEY = "nanochat.key";

function read(key, storage = localStorage) {
  try { return JSON.parse(storage.getItem(key)); } catch { return null; }
}

// A chat as we can show it, or null: what is stored may come from a file of somebody else's.
export function valid(raw) {
  if (!raw || typeof raw !== "object" || !Array.isArray(raw.messages)) return null;
  const kinds = ["text", "python", "python_output"];
  const messages = [];
  for (const m of raw.messages.slice(0, 1000)) {
    if (!m || !["user", "assistant"].includes(m.role) || typeof m.content !== "string") return null;
    const message = { role: m.role, content: m.content };
    const whole = Array.isArray(m.parts) && m.parts.every((p) => p && kinds.includes(p.type) && typeof p.text === "string");
    if (m.role === "assistant") message.parts = whole ? m.parts : [{ type: "text", text: m.content }];
    for (const name of ["note", "model"]) if (typeof m[name] === "string") message[name] = m[name];
    messages.push(message);
  }
  const id = typeof raw.id === "string" && /^[a-z0-9]{1,40}$/.test(raw.id) ? raw.id : blank().id;
  return { id, updated: Number(raw.updated) || 0, messages };
}

export function blank() {
  return { id: Date.now().toString(36) + Math.random().toString(36).slice(2, 10), updated: Date.now(), messages: [] };
}

export function chats() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    const chat = key.startsWith(CHAT) && valid(read(key));
    if (chat && chat.messages.length) found.push(chat);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

export function load(id) {
  return valid(read(CHAT + id));
}

// Returns false when the browser keeps nothing (storage full or off).
export function save(chat) {
  try {
    if (chat.messages.length) localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
    else localStorage.removeItem(CHAT + chat.id);
    return true;
  } catch { return false; }
}

export function drop(chat) {
  localStorage.removeItem(CHAT + chat.id);
}

export function isChat(key) {
  return key === null || key.startsWith(CHAT);
}

export function title(chat) {
  const first = chat.messages.find((m) => m.role === "user");
  return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 80) : "New chat";
}

export function settings() {
  return { ...(read(SETTINGS) || {}), key: read(KEY, sessionStorage) || "" };
}

// The key is kept for this tab only.
export function keep({ key, ...rest }) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(rest));
    sessionStorage.setItem(KEY, JSON.stringify(key || ""));
  } catch { /* a browser that keeps nothing still chats */ }
}
