// Takes over the page that the proxy has made: the same table, but of all rows, live.
import * as agents from "./agents.js";
import { at, count, h, put, say, set } from "./dom.js";
import * as groups from "./groups.js";
import { follow, orders, select, state, states } from "./live.js";
import { VirtualTable } from "./table.js";

const $ = (id) => document.getElementById(id);
const main = $("view"), panel = $("panel"), live = $("live");
const kinds = { agents, groups };
const titles = { __proto__: null, agents: "Agents", groups: "Push groups", status: "Status", config: "Prometheus" };
const narrow = matchMedia("(max-width: 56rem)");

let query = read();
let table = null; // of the view, once there is something to show
let details = null;

/** read returns what the URL asks for. */
function read() {
  const values = new URLSearchParams(location.search), get = (name) => values.get(name) ?? "";
  const q = { view: get("view"), q: get("q"), state: get("state"), sort: get("sort"), agent: get("agent"), group: get("group") };
  if (!q.view && location.pathname.endsWith("/status")) q.view = "status";
  if (q.agent) Object.assign(q, { view: "agents", group: "" });
  else if (q.group) q.view = "groups";
  if (!titles[q.view]) q.view = "agents";
  if (kinds[q.view] && !orders[q.view][q.sort.replace(/^-/, "")]) q.sort = firstColumn(q.view);
  if (!states[q.view]?.[q.state]) q.state = "";
  return q;
}

function firstColumn(view) { return view === "groups" ? "group" : "name"; }

function address(q) {
  const values = new URLSearchParams();
  for (const [name, value] of Object.entries(q)) {
    if (value && !(name === "view" && (value === "agents" || q.group || q.agent)) && !(name === "sort" && value === firstColumn(q.view))) values.set(name, value);
  }
  return `./${values.size ? `?${values}` : ""}`;
}

/** go changes what the page shows, and its address. */
function go(change, replace) {
  const next = { ...query, ...change };
  if (next.view !== query.view && !("q" in change)) Object.assign(next, { q: "", state: change.state ?? "", sort: firstColumn(next.view) });
  if (next.view !== query.view) Object.assign(next, { agent: change.agent ?? "", group: change.group ?? "" });
  history[replace ? "replaceState" : "pushState"](null, "", address(next));
  show(next);
}

function show(next) {
  const before = query;
  query = next;
  if (before.view !== next.view || !$("rows") && kinds[next.view]) mount();
  else if (table) rows();
  head();
  const key = next.agent || next.group;
  if (!key) closePanel();
  else if (details?.key !== key || details.view !== next.view) openPanel(next.view, key);
}

/** mount puts a view into the page. */
async function mount() {
  const { view } = query;
  table?.end();
  table = null;
  set(main, "data-view", view);
  main.scrollTop = 0;
  if (kinds[view]) {
    main.replaceChildren($(`${view}-view`).content.cloneNode(true));
    wire();
    if (state.summary) begin();
    return;
  }
  const note = h("p", { class: "muted" }, "…");
  main.replaceChildren(h("h1", null, titles[view]), note);
  try {
    await load(view);
  } catch (error) {
    note.replaceChildren(`${error.message}. `, h("button", { type: "button", click: mount }, "Try again"));
  }
}

let loaded = Date.now();

/** load shows a view that the proxy makes. */
async function load(view) {
  loaded = Date.now();
  const page = await fragment(address({ view, q: "", state: "", sort: "", agent: "", group: "" }));
  if (query.view !== view) return;
  main.replaceChildren(...page.getElementById("view").childNodes);
  copyButton();
}

/** fragment loads a page that the proxy makes. The browser parses it; its scripts don't run. */
function fragment(url) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("GET", at(url));
    request.responseType = "document";
    request.timeout = 20_000;
    request.onload = () => (request.status === 200 && request.response ? resolve(request.response) : reject(new Error(`the proxy answered ${request.status}`)));
    request.onerror = request.ontimeout = () => reject(new Error("the proxy can't be reached"));
    request.send();
  });
}

/** wire listens to the filter and the columns' heads. */
function wire() {
  const filter = $("filter"), choice = $("state"), form = filter.form;
  filter.value = query.q;
  choice.value = query.state;
  let timer = 0;
  const changed = () => {
    query = { ...query, q: filter.value.trim(), state: choice.value };
    if (table) {
      rows();
      main.scrollTop = 0;
    }
    head();
    clearTimeout(timer);
    timer = setTimeout(() => { // browsers bound how often the address may change
      history.replaceState(null, "", address(query));
      if (table) say(`${count(table.rows.length)} of ${count(state[query.view].size)} match`);
    }, 300);
  };
  filter.addEventListener("input", changed);
  choice.addEventListener("change", changed);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (table?.rows.length) table.focus(table.key(table.rows[0]));
  });
  filter.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && table?.rows.length) {
      event.preventDefault();
      table.focus(table.key(table.rows[0]));
    }
  });
  $("rows").tHead.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    event.preventDefault();
    const column = link.dataset.sort;
    go({ sort: query.sort === column ? `-${column}` : column }, true);
    say(`sorted by ${link.textContent}${query.sort.startsWith("-") ? ", descending" : ""}`);
  });
}

/** begin replaces the rows that the proxy has made by all of them. */
function begin() {
  const kind = kinds[query.view];
  table = new VirtualTable({
    scroller: main, table: $("rows"), key: kind.key, make: kind.make, fill: kind.fill, seen: lookSoon,
    open: (row) => go(query.view === "agents" ? { agent: row.name } : { group: row.path }),
  });
  rows();
  if (details) table.choose(details.key);
}

/** rows shows the rows that the query selects. keep: somebody reads them. */
function rows(keep) {
  const found = select(query.view, query), all = state[query.view].size;
  table.show(found, keep);
  put($("found"), found.length === all ? count(all) : `${count(found.length)} of ${count(all)}`);
  const empty = $("empty");
  empty.hidden = found.length > 0;
  table.table.hidden = found.length === 0;
  empty.querySelector("[data-empty=none]").hidden = all > 0;
  empty.querySelector("[data-empty=filter]").hidden = all === 0;
  if ($("state").value !== query.state) $("state").value = query.state;
  for (const cell of table.table.tHead.rows[0].cells) {
    const column = cell.firstElementChild?.dataset.sort;
    set(cell, "aria-sort", query.sort === column ? "ascending" : column && query.sort === `-${column}` ? "descending" : null);
  }
}

/** head shows the counts, the warnings and where one is. */
function head() {
  const { summary } = state;
  for (const link of document.querySelectorAll(".top nav a")) set(link, "aria-current", link.dataset.view === query.view ? "page" : null);
  const counts = summary && { connected: summary.connected, lost: summary.lost, failing: summary.failing, late: summary.groups_late, failed: summary.groups_failed };
  for (const chip of document.querySelectorAll(".chip")) {
    const active = chip.dataset.view === query.view && chip.dataset.state === query.state;
    set(chip, "aria-current", active ? "true" : null);
    set(chip, "href", `./${address({ view: chip.dataset.view, state: active ? "" : chip.dataset.state, sort: firstColumn(chip.dataset.view) }).slice(2)}`);
    if (!counts) continue;
    put(chip.firstElementChild, count(counts[chip.dataset.state]));
    chip.classList.toggle("zero", !counts[chip.dataset.state]);
  }
  document.title = `${details ? details.title() : titles[query.view]} · Culvert`;
  if (!summary) return;
  for (const n of document.querySelectorAll("[data-count]")) put(n, count(summary[n.dataset.count]));
  document.body.classList.toggle("several", state.several);
  const actions = main.querySelector(".actions");
  if (actions && query.view === "groups" && state.may.operate !== (actions.childElementCount > 0)) {
    actions.replaceChildren(...(state.may.operate ? [h("button", { type: "button", click: () => groups.deleteMatching(acted) }, "Delete by selector…")] : []));
  }
  warn();
}

let warned = "";

function warn() {
  const list = state.warnings.map(({ code, text }) => ({ code, text }));
  if (state.draining && !list.some(({ code }) => code === "draining")) list.unshift({ code: "draining", text: "This proxy is going away." });
  const { version } = document.body.dataset;
  if (version !== state.version) list.unshift({ code: "version", text: `The proxy is of version ${state.version} now, and this page of ${version}: reload it.` });
  const stamp = JSON.stringify(list);
  if (stamp === warned) return;
  warned = stamp;
  $("warnings").hidden = list.length === 0;
  $("warnings").replaceChildren(...list.map(({ code, text }) => h("p", { class: "warning", "data-code": code }, h("span", { class: "mark late" }), h("span", null, text))));
}

function openPanel(view, key) {
  const inside = panel.contains(document.activeElement);
  details = new kinds[view].Details(key, (text) => {
    acted(text);
    go({ agent: "", group: "" });
  });
  details.key = key;
  details.view = view;
  const title = h("h2", { id: "panel-title", tabindex: -1 }, details.title());
  details.heading = title;
  panel.replaceChildren(h("div", { class: "panel-head" }, title, h("button", { type: "button", class: "quiet close", "aria-label": "Close the details", title: "Close (Escape)", click: () => go({ agent: "", group: "" }) })), details.element);
  set(panel, "aria-label", `Details of ${details.title()}`);
  panel.hidden = false;
  panel.scrollTop = 0;
  cover();
  table?.choose(key);
  if (inside || document.activeElement === document.body || main.contains(document.activeElement)) title.focus({ preventScroll: true });
  details.update();
}

function closePanel() {
  if (!details) return;
  const { key } = details, inside = panel.contains(document.activeElement) || document.activeElement === document.body;
  details = null;
  panel.hidden = true;
  panel.replaceChildren();
  cover();
  table?.choose(null);
  if (inside && !table?.focus(key)) $("filter")?.focus();
}

/** cover keeps what the panel covers on a phone from being reached. */
function cover() { main.inert = narrow.matches && details !== null; }
narrow.addEventListener("change", cover);

/** acted says what was done, and asks the proxy at once what it looks like now. */
function acted(text) {
  say(text, 0);
  poll();
}

let looking = 0, lookedAt = 0;

/** lookSoon asks for the scrapes of the rows in view, once they have come to rest. */
function lookSoon() {
  if (query.view !== "agents" || looking) return;
  looking = setTimeout(async () => {
    try {
      if (table && query.view === "agents") await agents.look(table);
    } catch { /* the next update tells why */ }
    lookedAt = Date.now();
    looking = 0;
  }, Math.max(150, lookedAt + 1000 - Date.now()));
}

const poll = follow({
  changed(change) {
    if (change.first && kinds[query.view] && !$("rows")) mount(); // the proxy has made details
    else if (kinds[query.view]) {
      if (!table) begin();
      else if (change[query.view]) rows(true);
    }
    if (change.first) {
      const key = query.agent || query.group;
      if (key) openPanel(query.view, key);
    } else if (details) {
      details.draw();
      put(details.heading, details.title());
      details.update();
    }
    head();
    lookSoon();
    // Not while somebody is about to copy of it.
    if (query.view === "status" && Date.now() - loaded > 10_000 && getSelection().isCollapsed && !main.querySelector(":focus")) {
      load("status").catch(() => { /* the next update tells why */ });
    }
    const { lost, back } = change, some = (names, one, many) => (names.length === 1 ? `${names[0]} ${one}` : `${count(names.length)} agents ${many}`);
    const news = [lost.length ? some(lost, "is lost", "are lost") : "", back.length ? some(back, "is connected again", "are connected again") : ""].filter(Boolean);
    if (news.length) say(news.join(", "));
  },
  told(reason, last) {
    live.classList.toggle("on", !reason);
    live.classList.toggle("off", Boolean(reason));
    put(live, reason ? `not live: ${reason}` : "live");
    set(live, "title", reason && last ? `last updated ${new Date(last).toLocaleTimeString()}; trying again every 2 seconds` : null);
  },
});

setInterval(() => {
  if (document.hidden) return;
  details?.draw();
  if (Date.now() % 5000 < 1000) table?.refill();
}, 1000);

document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button !== 0) return;
  if (link.classList.contains("chip")) go({ view: link.dataset.view, agent: "", group: "", q: "", sort: firstColumn(link.dataset.view), state: link.getAttribute("aria-current") ? "" : link.dataset.state });
  else if (link.dataset.view) go({ view: link.dataset.view, agent: "", group: "" });
  else if ("clear" in link.dataset) go({ q: "", state: "" });
  else return;
  event.preventDefault();
  if ($("filter")) $("filter").value = query.q;
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing && $("filter")) {
    event.preventDefault();
    if (narrow.matches && details) go({ agent: "", group: "" });
    $("filter").focus();
    $("filter").select();
  } else if (event.key === "Escape" && details && !(typing && typing.value)) {
    event.preventDefault();
    go({ agent: "", group: "" });
  }
});

addEventListener("popstate", () => {
  show(read());
  if ($("filter")) $("filter").value = query.q;
});

/** copyButton offers to copy the scrape configuration. */
function copyButton() {
  const text = $("scrape-config");
  if (!text || text.nextElementSibling) return;
  const button = h("button", { type: "button", click: async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch { // there is none without https
      getSelection().selectAllChildren(text);
      if (!document.execCommand("copy")) return say("select it and copy it by hand", 0);
    }
    put(button, "Copied");
    say("copied", 0);
    setTimeout(() => put(button, "Copy"), 2000);
  } }, "Copy");
  text.after(button);
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const themed = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
const name = () => { for (const a of ["aria-label", "title"]) set($("theme"), a, `Switch to the ${themed() === "dark" ? "light" : "dark"} theme`); };
$("theme").hidden = false;
$("theme").addEventListener("click", () => {
  const theme = themed() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("culvert-theme", theme);
  } catch { /* storage is off: it lasts as long as the page */ }
  name();
});
dark.addEventListener("change", name);
name();

if ($("filter")) wire();
copyButton();
head();
