// The moving parts of the pages: figures that refresh, and changes as they happen. Everything else works without a script.
// Data from callers is only ever put into a page as text.
"use strict";

const REFRESH_MS = 3000;
const MOST_ROWS = 500;

// ---------------------------------------------------------------------------------------------- figures that refresh

function refreshing() {
  const region = document.querySelector("[data-live]");
  const button = document.querySelector("[data-refresh]");
  if (!region || !button) return;
  let on = true;
  button.hidden = false;
  button.addEventListener("click", () => {
    on = !on;
    button.setAttribute("aria-pressed", String(on));
    button.textContent = on ? "Refreshing" : "Refresh";
  });
  // A reader who has moved into the region, or has selected text there, is not disturbed.
  const inUse = () => region.contains(document.activeElement) || !document.getSelection().isCollapsed;
  async function refresh() {
    try {
      const response = await fetch(location.href, { headers: { Accept: "text/html" }, redirect: "error" });
      if (response.ok) {
        const page = new DOMParser().parseFromString(await response.text(), "text/html");
        const fresh = page.querySelector("[data-live]");
        if (fresh && on && !inUse()) {
          const open = [...region.querySelectorAll("details")].map((one) => one.open);
          region.replaceChildren(...fresh.childNodes);
          region.querySelectorAll("details").forEach((one, at) => { one.open = open[at] ?? one.open; });
        }
      }
    } catch {
      // The server does not answer: the next attempt may succeed.
    }
  }
  setInterval(() => { if (on && !document.hidden && !inUse()) refresh(); }, REFRESH_MS);
}

// -------------------------------------------------------------------------------------------------------- live changes

// Reads a stream while the page is visible: a browser has six connections for all its pages of one site. When the page
// is visible again, the stream continues after the last change. Returns a function that ends it.
function follow(address, take, tell) {
  let source = null;
  let last = "";
  function close() {
    source?.close();
    source = null;
  }
  function open() {
    if (source) return;
    source = new EventSource(last ? `${address}${address.includes("?") ? "&" : "?"}since=${encodeURIComponent(last)}` : address);
    source.addEventListener("open", () => tell(true, false));
    source.addEventListener("error", (event) => tell(false, event.target.readyState === EventSource.CLOSED));
    source.addEventListener("resync", (event) => { if (JSON.parse(event.data).reason !== "begin") tell(true, false, true); });
    source.addEventListener("cursor", (event) => { last = event.lastEventId || last; });
    for (const kind of ["put", "delete", "expire"]) {
      source.addEventListener(kind, (event) => { last = event.lastEventId || last; take(event); });
    }
  }
  function visible() {
    if (document.hidden) close(); else open();
  }
  document.addEventListener("visibilitychange", visible);
  visible();
  return () => { document.removeEventListener("visibilitychange", visible); close(); };
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function rowOf(change) {
  const row = element("tr");
  const time = element("td");
  const now = element("time", change.time.toISOString().slice(11, 23));
  now.dateTime = change.time.toISOString();
  time.append(now);
  const kind = element("td");
  const looks = { created: "good", updated: "", deleted: "bad", expired: "warn" };
  kind.append(element("span", change.kind, `badge ${looks[change.kind] ?? ""}`));
  const key = element("td");
  const link = element("a", change.key);
  link.setAttribute("href", change.entry);
  key.append(link);
  const value = element("td", undefined, "preview");
  value.append(element("code", change.value));
  row.append(time, kind, element("td", change.scope), key, element("td", change.revision.toLocaleString("en"), "num"), value);
  return row;
}

function liveChanges() {
  const table = document.querySelector("[data-changes]");
  if (!table) return;
  const body = document.getElementById("changes");
  const state = document.getElementById("stream-state");
  const pause = document.getElementById("pause");
  const clear = document.getElementById("clear");
  const empty = document.getElementById("no-changes");
  let waiting = [];
  let missed = 0;
  let paused = false;
  let drawing = false;
  let connected = false;
  let incomplete = false;

  function tell() {
    const held = waiting.length + missed;
    state.textContent = paused
      ? `Paused, ${held.toLocaleString("en")} change${held === 1 ? "" : "s"} waiting`
      : connected ? (incomplete ? "Live; some changes are gone, and are not shown" : "Live") : "Not connected, trying again";
  }
  function draw() {
    drawing = false;
    if (paused || !waiting.length) return;
    body.prepend(...waiting.reverse().map(rowOf));
    waiting = [];
    missed = 0;
    while (body.rows.length > MOST_ROWS) body.lastElementChild.remove();
    empty.hidden = true;
  }
  function take(event) {
    waiting.push({ ...JSON.parse(event.data), time: new Date() });
    if (waiting.length > MOST_ROWS) { waiting.shift(); missed += 1; }
    if (paused) tell();
    else if (!drawing) { drawing = true; setTimeout(draw, 100); }
  }
  pause.hidden = clear.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? "Resume" : "Pause";
    pause.setAttribute("aria-pressed", String(paused));
    tell();
    draw();
  });
  clear.addEventListener("click", () => { body.replaceChildren(); waiting = []; missed = 0; incomplete = false; empty.hidden = false; tell(); });

  follow(table.dataset.changes, take, (now, refused, gap = false) => {
    connected = now;
    incomplete ||= gap;
    if (refused) state.textContent = "Not connected: the console refuses the stream. Load the page again.";
    else tell();
  });
}

// ------------------------------------------------------------------------------------------ an entry that is changed

function changedEntry() {
  const notice = document.querySelector("[data-changed]");
  if (!notice) return;
  const end = follow(notice.dataset.stream, () => { notice.hidden = false; end(); }, () => {});
}

refreshing();
liveChanges();
changedEntry();
