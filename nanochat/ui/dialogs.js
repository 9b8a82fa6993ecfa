// Settings, shortcuts, and what can be done with all chats at once.

import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const SAMPLER = ["temperature", "max_tokens", "top_k", "top_p", "min_p", "seed"];
const FIELDS = [...SAMPLER, "system", "theme", "key"];

export function dialogs({ download, toast, refresh, changed }) {
  const kept = store.settings();
  for (const name of FIELDS) if (kept[name] !== undefined) $(name).value = kept[name];
  $("certainty").checked = kept.certainty !== false;
  theme();

  function write() {
    const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
    for (const name of SAMPLER) if (!$(name).checkValidity()) values[name] = "";   // out of bounds: the server's default
    store.keep({ ...store.settings(), ...values, certainty: $("certainty").checked });
    theme();
  }

  for (const name of [...FIELDS, "certainty"]) $(name).addEventListener("change", write);
  $("settings").addEventListener("close", () => { write(); changed(); });
  $("open-settings").addEventListener("click", () => $("settings").showModal());
  $("open-keys").addEventListener("click", () => $("keys").showModal());
  for (const box of [$("settings"), $("keys")]) box.addEventListener("click", (e) => { if (e.target === box) box.close(); });
  $("reset").addEventListener("click", () => { for (const name of SAMPLER) $(name).value = ""; write(); });
  $("export").addEventListener("click", () => download(store.chats(), "chats"));
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    const [file] = $("file").files;
    $("file").value = "";
    if (file) toast(await read(file));
    refresh();
  });
  $("delete-all").addEventListener("click", () => {
    const all = store.chats();
    all.forEach(store.drop);
    $("settings").close();
    refresh();
    toast("Deleted " + all.length + " chats", () => { all.forEach(store.save); refresh(); });
  });
}

async function read(file) {
  let chats = null;
  try { ({ chats } = JSON.parse(await file.text())); } catch { /* told below */ }
  const good = Array.isArray(chats) ? chats.map(store.valid).filter(Boolean) : [];
  good.forEach(store.save);
  return good.length ? "Imported " + good.length + " chats" : "That file holds no chats of nanochat.";
}

function theme() {
  const chosen = $("theme").value;
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
}
