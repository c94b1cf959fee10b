// The rows and the details of agents.
import { absolute, ask, at, bytes, confirmed, count, data, facts, h, labels, put, s, seconds, set, tag, time, touch, when } from "./dom.js";
import { state } from "./live.js";

/** scrapes are what the rows in view show of their targets, by agent. */
const scrapes = new Map();

export const key = (row) => row.name;

export function make() {
  const cell = (name) => h("td", { class: `c-${name}` });
  return h("tr", null, h("th", { scope: "row", class: "c-name" }, h("a")),
    cell("state"), cell("since"), cell("health"), cell("rtt"), cell("version"), cell("labels"), cell("proxy"));
}

export function fill(tr, row) {
  const [name, status, since, health, rtt, version, tags, proxy] = tr.cells;
  if (tr.shown !== row) {
    tr.shown = row;
    tr.logs = undefined;
    tr.className = row.state + (tr.classList.contains("chosen") ? " chosen" : "") + (Date.now() - row.changedAt < 2500 ? " changed" : "");
    const link = name.firstChild;
    put(link, row.name);
    set(link, "href", `?${new URLSearchParams({ agent: row.name })}`);
    set(name, "title", row.name.length > 26 ? row.name : null);
    status.replaceChildren(h("span", { class: `state ${row.state}` }, row.state));
    since.replaceChildren(when(row.sinceAt));
    put(rtt, seconds(row.rtt_seconds));
    put(version, row.version || "–");
    tags.replaceChildren(...labels(row.labels).flatMap(([n, v]) => [tag(n, v), " "]));
    put(proxy, (row.proxies ?? []).map((id) => id.slice(0, 8)).join(" "));
  }
  touch(since.firstChild, row.sinceAt);
  const logs = row.connected ? scrapes.get(row.name) : undefined;
  if (tr.logs === logs && tr.logs !== undefined) return;
  tr.logs = logs;
  if (!row.connected || !logs?.length) {
    const text = !row.connected && row.lost_reason ? row.lost_reason : !row.scraped ? "none yet" : row.failing ? `${row.failing} of ${row.scraped} failing` : `${row.scraped} ok`;
    put(health, text);
    set(health, "title", text);
    return;
  }
  const bad = (log) => log.last && log.last.outcome !== "ok";
  const rank = (log) => (bad(log) ? 0 : log.target === "agent" ? 2 : 1);
  const first = [...logs].sort((a, b) => rank(a) - rank(b));
  set(health, "title", first.map((log) => `${log.target}: ${log.last ? outcome(log.last) : "no scrape"}`).join("\n"));
  health.replaceChildren(h("div", { class: "scrapes" }, first.slice(0, 4).map((log) => h("span", { class: `scrape ${bad(log) ? "failing" : "ok"}` },
    log.target, " ", h("b", null, bad(log) ? log.last.outcome : seconds(log.last?.seconds)), bad(log) ? null : spark(log.durations ?? [])))));
}

const outcome = (scrape) => (scrape.outcome === "ok" ? `ok in ${seconds(scrape.seconds)}` : scrape.error || scrape.outcome);

/** spark draws the durations of the last scrapes. */
function spark(durations) {
  if (durations.length < 2) return null;
  const most = Math.max(...durations, 1e-9);
  const points = durations.map((d, i) => `${(i * 54 / (durations.length - 1) + 1).toFixed(1)},${(14.5 - 13 * d / most).toFixed(1)}`).join(" ");
  return s("svg", { class: "spark", viewBox: "0 0 56 16", "aria-hidden": "true" }, s("polyline", { points }));
}

/** look asks for the scrapes of the rows in view. */
export async function look(table) {
  const names = table.visible().filter((row) => row.connected).map((row) => row.name).slice(0, 100);
  if (!names.length) return;
  const found = await data(`api/v1/scrapes?${new URLSearchParams(names.map((name) => ["agent", name]))}`);
  if (scrapes.size > 2000) scrapes.clear(); // those in view come with the next answer
  for (const name of names) {
    const logs = found[name] ?? [], before = scrapes.get(name);
    const stamp = logs.map((log) => `${log.target} ${log.scrapes}`).join("\n");
    if (before && before.stamp === stamp) continue;
    logs.stamp = stamp;
    scrapes.set(name, logs);
  }
  table.refill();
}

/** Details is what the panel shows of an agent. */
export class Details {
  constructor(name, act) {
    this.name = name;
    this.act = act; // after something was done
    this.blocks = new Map();
    this.status = h("p");
    this.facts = h("div");
    this.targets = h("div");
    this.note = h("p", { class: "muted" }, "…");
    this.port = h("input", { inputmode: "numeric", pattern: "[0-9]{1,5}", required: true, placeholder: "9100", size: 6, name: "port", autocomplete: "off" });
    this.path = h("input", { placeholder: "/metrics", size: 14, name: "path", autocomplete: "off", spellcheck: "false" });
    this.output = h("div", { class: "output", role: "status" });
    this.free = h("form", { class: "fields", submit: (event) => { event.preventDefault(); this.scrapePort(event.submitter ?? this.go); } },
      h("label", null, "Port", this.port), h("label", null, "Path", this.path), this.go = h("button", { type: "submit" }, "Scrape this port"));
    this.forget = h("div", { class: "row" });
    this.element = h("div", null, this.status, this.facts, h("h3", null, "Targets"), this.note, this.targets, h("h3", null, "Any port"), this.free, this.output, this.forget);
    this.draw();
  }

  title() { return this.name; }

  /** draw shows what the list knows, update asks for more. */
  draw() {
    const row = state.agents.get(this.name);
    if (!row) {
      if (state.summary) {
        this.status.replaceChildren("No agent of this name is known any more.");
        this.forget.replaceChildren();
      }
      return;
    }
    if (this.row !== row) {
      this.row = row;
      this.status.replaceChildren(h("span", { class: `state ${row.state}` }, row.state), row.state === "failing" ? `: ${row.failing} of ${row.scraped} targets; connected ` : " ", this.since = when(row.sinceAt), row.lost_reason && !row.connected ? `: ${row.lost_reason}` : "");
      this.forget.replaceChildren(...(state.may.operate && !row.connected ? [h("button", { type: "button", class: "danger", click: () => this.ask() }, "Forget this agent…")] : []));
    }
    touch(this.since, row.sinceAt);
    for (const block of this.blocks.values()) block.draw();
  }

  async update() {
    let info;
    try {
      info = await data(`api/v1/agents/${encodeURIComponent(this.name)}`);
    } catch (error) {
      if (!this.info) put(this.note, error.message);
      return;
    }
    this.info = info;
    const registration = info.registration ?? {};
    const rows = [
      ["Version", `${registration.version || "–"}${info.kind === "pushprox" ? " (a PushProx client)" : ""}`],
      ["Address", info.remote_address || "–"],
      ["Transport", info.transport || "–"],
      ["RTT", seconds(info.rtt_seconds)],
      ["First seen", absolute(time(info.first_seen))],
      ["Passed on", info.bytes_total === undefined ? null : bytes(info.bytes_total)],
      ["Proxy", info.proxies?.length ? info.proxies.map(({ id, url }) => h("div", null, h("code", null, id), id === state.proxy ? " (this one)" : url ? ` ${url}` : "")) : null],
      ["Labels", labels(registration.labels).length ? labels(registration.labels).flatMap(([n, v]) => [tag(n, v), " "]) : null],
      ["Answers for", registration.hosts?.length ? registration.hosts.flatMap((host) => [h("code", null, host), " "]) : null],
    ];
    const stamp = JSON.stringify(rows.map(([name, value]) => (typeof value === "string" ? value : name)).concat(registration));
    if (this.stamp !== stamp) {
      this.stamp = stamp;
      this.facts.replaceChildren(facts(rows));
    }
    this.list(registration, info.scrapes ?? []);
    this.draw();
  }

  /** list brings the blocks of the targets up to date: the declared ones, and what else was scraped. */
  list(registration, logs) {
    const wanted = new Map();
    for (const target of registration.targets ?? []) {
      const query = new URLSearchParams(Object.entries(target.params ?? {}).flatMap(([n, values]) => values.map((v) => [n, v]))).toString();
      wanted.set(target.name, { path: target.path.replace(/\/\*$/, "/") + (query && `?${query}`) });
    }
    if (this.info.kind !== "pushprox") wanted.set("agent", { path: "/metrics" });
    for (const log of logs) {
      const known = wanted.get(log.target);
      if (known && log.mode !== "connect" && !known.log) known.log = log;
      else wanted.set(`${log.target}\n${log.mode}\n${log.url}`, { path: pathOf(log.url), log });
    }
    for (const [id, { path, log }] of wanted) {
      let block = this.blocks.get(id);
      if (!block) {
        block = new Target(this, id.split("\n")[0], path, log?.mode === "connect");
        this.blocks.set(id, block);
        this.targets.append(block.element);
      }
      block.log = log;
      block.draw();
    }
    for (const [id, block] of this.blocks) {
      if (wanted.has(id)) continue;
      block.element.remove();
      this.blocks.delete(id);
    }
    put(this.note, wanted.size ? "" : "None is declared, and none was scraped.");
    this.note.hidden = wanted.size > 0;
  }

  async scrapePort(button) {
    const path = this.path.value.trim() || "/metrics";
    await scrape(button, this.output, this.name, this.port.value.trim(), path.startsWith("/") ? path : `/${path}`);
    this.update();
  }

  async ask() {
    const done = await confirmed({
      title: "Forget this agent?", button: "Forget",
      body: h("p", null, h("strong", null, this.name), " leaves discovery at once, so its series end and nothing alerts on it any more. If it still runs, it comes back by itself."),
      act: () => ask(`api/v1/agents/${encodeURIComponent(this.name)}`, { method: "DELETE" }),
    });
    if (done) this.act(`${this.name} is forgotten`);
  }
}

function pathOf(url) {
  try {
    const { pathname, search } = new URL(url);
    return pathname + search;
  } catch {
    return "/metrics";
  }
}

/** Target is a target among the details. */
class Target {
  constructor(details, name, path, tunnel) {
    this.last = h("div", { class: "result" });
    this.why = h("p", { class: "why" });
    this.output = h("div", { class: "output", role: "status" });
    this.button = tunnel ? null : h("button", { type: "button", "aria-label": `Scrape now: ${name}`, click: async () => {
      const cut = name.lastIndexOf(":"); // HOST:9100 is another host that the agent answers for
      await scrape(this.button, this.output, cut < 0 ? details.name : name.slice(0, cut), name.slice(cut + 1), path);
      details.update();
    } }, "Scrape now");
    this.element = h("section", { class: "target", "aria-label": `Target ${name}` },
      h("div", { class: "target-head" }, h("h4", null, name, " ", h("span", null, tunnel ? "https, from end to end" : path)), this.button), this.last, this.why, this.output);
  }

  draw() {
    const scrape = this.log?.history?.at(-1);
    if (!scrape) {
      put(this.last, "not scraped through this proxy yet");
      this.last.classList.add("muted");
      return;
    }
    const then = time(scrape.at);
    if (this.drawn === then) {
      touch(this.when, then);
      return;
    }
    this.drawn = then;
    this.last.classList.remove("muted");
    const ok = scrape.outcome === "ok";
    this.last.replaceChildren(h("span", { class: `state ${ok ? "ok" : "failing"}` }, ok ? "ok" : scrape.outcome), h("span", null, seconds(scrape.seconds)), h("span", null, bytes(scrape.bytes)),
      this.when = when(then), h("span", { class: "muted" }, `${count(this.log.failures)} of ${count(this.log.scrapes)} failed`), chart(this.log.history));
    put(this.why, ok ? "" : scrape.error ?? "");
  }
}

/** chart draws a history: how long each scrape took; failed ones are hollow, and of full height. */
function chart(history) {
  const most = Math.max(...history.map((scrape) => scrape.seconds), 1e-9);
  const failed = history.filter((scrape) => scrape.outcome !== "ok").length;
  const bars = history.map((scrape, n) => {
    const i = n + 20 - history.length; // the last one is on the right
    const ok = scrape.outcome === "ok", height = ok ? Math.max(2, 26 * scrape.seconds / most) : 26;
    return s("rect", { class: ok ? "bar" : "bad", x: i * 6 + 1, y: (28 - height).toFixed(1), width: 4, height: height.toFixed(1), rx: 1 },
      s("title", null, `${absolute(time(scrape.at))}: ${ok ? `ok, ${bytes(scrape.bytes)}` : scrape.error || scrape.outcome} in ${seconds(scrape.seconds)}`));
  });
  return s("svg", { class: "history", viewBox: "0 0 122 30", role: "img", "aria-label": `The last ${history.length} scrapes: ${failed} failed, the longest took ${seconds(most)}` },
    s("line", { class: "base", x1: 0, x2: 122, y1: 29, y2: 29 }), bars);
}

// How much of an answer is shown, and how much is read to tell its size.
const SHOWN = 8 << 10, READ = 64 << 20;

/** scrape scrapes a target now, through the proxy, and shows what comes back. */
async function scrape(button, output, name, target, path) {
  const url = `scrape/${encodeURIComponent(name)}/${encodeURIComponent(target)}${path}`;
  const began = performance.now();
  const took = () => seconds((performance.now() - began) / 1000);
  button.disabled = true;
  output.replaceChildren(h("p", { class: "muted" }, "Scraping…"));
  try {
    const response = await fetch(at(url), { cache: "no-store", headers: { Accept: "text/plain", "X-Prometheus-Scrape-Timeout-Seconds": "15" }, signal: AbortSignal.timeout(20_000) });
    const decoder = new TextDecoder();
    let text = "", size = 0, broken = "";
    try {
      for (let reader = response.body.getReader(), part; !(part = await reader.read()).done;) {
        size += part.value.length;
        if (text.length < SHOWN) text += decoder.decode(part.value, { stream: true });
        if (size > READ) {
          broken = `more than ${bytes(READ)}: the rest was not read`;
          reader.cancel();
          break;
        }
      }
    } catch {
      broken = "the answer broke off";
    }
    const good = response.ok && !broken, code = response.headers.get("Culvert-Error");
    const line = [h("span", { class: `state ${good ? "ok" : "failing"}` }, `${response.status}${code ? ` ${code}` : ""}`), ` in ${took()}, ${bytes(size)}`,
      response.headers.get("Content-Type") ? `, ${response.headers.get("Content-Type")}` : "", text.length > SHOWN ? `; the first ${bytes(SHOWN)}:` : ""];
    output.replaceChildren(h("p", null, ...line), broken ? h("p", { class: "why" }, broken) : "",
      h("pre", { tabindex: 0, role: "group", "aria-label": "What came back" }, text.slice(0, SHOWN) || "(nothing)"), h("p", null, h("a", { href: url, target: "_blank", rel: "noopener" }, "Scrape it in a tab of its own")));
  } catch (error) {
    output.replaceChildren(h("p", null, h("span", { class: "state failing" }, error.name === "TimeoutError" ? `no answer in ${took()}` : "the proxy can't be reached")));
  } finally {
    button.disabled = false;
  }
}

