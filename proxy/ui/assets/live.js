import { data, natural, time } from "./dom.js";

// How often the proxy is asked while somebody looks, in ms.
const EVERY = 2000;

/**
 * state is what the page shows, as it was told last. Agents and groups are replaced, never
 * changed: one that is the same object is the same.
 */
export const state = {
  agents: new Map(), // by name
  groups: new Map(), // by path
  summary: null, warnings: [], may: {}, draining: false, proxy: "", version: "", several: false,
};

let token = "";

/**
 * follow keeps state up to date, while somebody looks. changed is called after each answer,
 * with what it changed: {first, agents, groups, lost, back}, of which agents and groups tell
 * whether rows came, went or changed, and lost and back name agents. told is called with ""
 * while the page is live, else with the reason why it isn't; and with when it last was. It
 * returns a function that asks at once.
 */
export function follow({ changed, told }) {
  let timer = 0, asking = false, last = 0;
  const poll = async () => {
    clearTimeout(timer);
    if (asking || document.hidden) return;
    asking = true;
    let update = null, reason = "";
    try {
      update = await data(`api/v1/page${token && `?since=${encodeURIComponent(token)}`}`);
      last = Date.now();
    } catch (error) {
      reason = error.message;
    }
    asking = false;
    timer = setTimeout(poll, EVERY);
    told(reason, last);
    if (update) changed(apply(update));
  };
  document.addEventListener("visibilitychange", poll);
  addEventListener("online", poll);
  poll();
  return poll;
}

function apply(update) {
  const first = !state.summary;
  const change = { first, agents: false, groups: false, lost: [], back: [] };
  const known = state.agents;
  if (update.full) {
    state.agents = new Map();
    state.groups = new Map();
    change.agents = change.groups = true;
  }
  for (const row of update.agents ?? []) {
    const before = known.get(row.name);
    if (before && before.connected !== row.connected) (row.connected ? change.back : change.lost).push(row.name);
    state.agents.set(row.name, agent(row, before));
    change.agents = true;
  }
  for (const name of update.agents_gone ?? []) change.agents = state.agents.delete(name) || change.agents;
  for (const row of update.groups ?? []) {
    state.groups.set(row.path, group(row));
    change.groups = true;
  }
  for (const path of update.groups_gone ?? []) change.groups = state.groups.delete(path) || change.groups;
  Object.assign(state, { summary: update.summary, warnings: update.warnings ?? [], may: update.may ?? {}, draining: update.draining, proxy: update.proxy, version: update.version });
  if (change.agents) state.several = [...state.agents.values()].some((a) => a.proxies?.length);
  token = update.token;
  return change;
}

const pairs = (labels) => Object.entries(labels ?? {}).map(([name, value]) => `${name}=${value}`);

/** agent adds to a row what it is filtered and sorted by. */
function agent(row, before) {
  row.state = !row.connected ? "lost" : row.health === "failing" ? "failing" : "connected";
  row.sinceAt = time(row.since);
  row.order = natural(row.name);
  row.versionOrder = natural(row.version ?? "");
  row.words = [row.name, row.version, row.kind, row.remote_address, row.lost_reason, ...(row.targets ?? []), ...(row.hosts ?? []), ...(row.proxies ?? []), ...pairs(row.labels)]
    .join("\n").toLowerCase();
  row.changedAt = before && before.state !== row.state ? Date.now() : 0;
  return row;
}

function group(row) {
  row.job = row.labels?.job ?? "";
  row.others = pairs(row.labels).filter((pair) => !pair.startsWith("job=")).sort();
  row.pushedAt = time(row.pushed);
  row.failedAt = time(row.failed);
  row.expiresAt = time(row.expires);
  row.order = natural([row.job, ...row.others].join("\n"));
  row.words = pairs(row.labels).join("\n").toLowerCase();
  return row;
}

const behind = (at) => at || Infinity;
const rank = (order) => (a, b) => order.indexOf(a.state) - order.indexOf(b.state);
const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

// The same orders and states as those of the page that the proxy makes. They are looked up
// by what stands in an address: nothing is inherited.
export const orders = {
  agents: {
    __proto__: null,
    name: () => 0,
    state: rank(["lost", "failing", "connected"]),
    since: (a, b) => b.sinceAt - a.sinceAt,
    health: (a, b) => b.failing - a.failing || b.scraped - a.scraped,
    rtt: (a, b) => (a.rtt_seconds ?? 0) - (b.rtt_seconds ?? 0),
    version: (a, b) => compare(a.versionOrder, b.versionOrder),
    proxy: (a, b) => compare((a.proxies ?? []).join(" "), (b.proxies ?? []).join(" ")),
  },
  groups: {
    __proto__: null,
    group: () => 0,
    state: rank(["failed", "late", "expired", "ok"]),
    pushed: (a, b) => compare(behind(b.pushedAt), behind(a.pushedAt)),
    expires: (a, b) => compare(behind(a.expiresAt), behind(b.expiresAt)),
    up: (a, b) => compare(a.up === undefined ? 2 : Number(a.up), b.up === undefined ? 2 : Number(b.up)),
    series: (a, b) => b.series - a.series,
    interval: (a, b) => (a.interval_seconds ?? 0) - (b.interval_seconds ?? 0),
  },
};

export const states = {
  agents: { __proto__: null, connected: (a) => a.connected, lost: (a) => !a.connected, failing: (a) => a.health === "failing" },
  groups: { __proto__: null, ok: (g) => g.state === "ok", late: (g) => g.up === false, failed: (g) => g.state === "failed", expired: (g) => g.state === "expired" },
};

/** select returns the rows of a view that the query selects, in its order. */
export function select(view, query) {
  const words = query.q.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = states[view][query.state];
  let rows = [...state[view].values()];
  if (wanted) rows = rows.filter(wanted);
  if (words.length) rows = rows.filter((row) => words.every((word) => row.words.includes(word)));
  const column = query.sort.replace(/^-/, ""), order = orders[view][column] ?? (() => 0), sign = query.sort.startsWith("-") ? -1 : 1;
  return rows.sort((a, b) => sign * (order(a, b) || compare(a.order, b.order)));
}
