// The rows and the details of push groups, and their deletion.
import { absolute, ask, bytes, confirmed, count, countdown, data, facts, h, put, seconds, set, touch, when } from "./dom.js";
import { state } from "./live.js";

export const key = (row) => row.path;

export function make() {
  const cell = (name) => h("td", { class: `c-${name}` });
  return h("tr", null, h("th", { scope: "row", class: "c-group" }, h("a")), cell("state"), cell("pushed"), cell("expires"), cell("up"), cell("series"), cell("interval"));
}

const word = (row) => (row.state === "failed" ? "refused" : row.state);
const up = (row) => (row.up === undefined ? "–" : row.up ? "1" : "0");

export function fill(tr, row) {
  const [name, status, pushed, expires, pushUp, series, interval] = tr.cells;
  if (tr.shown !== row) {
    tr.shown = row;
    tr.className = row.state + (tr.classList.contains("chosen") ? " chosen" : "");
    const link = name.firstChild;
    put(link, row.job);
    set(link, "href", `?${new URLSearchParams({ group: row.path })}`);
    set(name, "title", [`job=${row.job}`, ...row.others].join("\n"));
    name.replaceChildren(link, ...row.others.flatMap((pair) => [" ", h("span", { class: "tag" }, pair)]));
    status.replaceChildren(h("span", { class: `state ${row.state}` }, word(row)));
    pushed.replaceChildren(when(row.pushedAt));
    expires.replaceChildren(when(row.expiresAt));
    put(pushUp, up(row));
    put(series, count(row.series));
    put(interval, seconds(row.interval_seconds));
  }
  touch(pushed.firstChild, row.pushedAt);
  touch(expires.firstChild, row.expiresAt);
}

/** Details is what the panel shows of a group. */
export class Details {
  constructor(path, act) {
    this.path = path;
    this.act = act;
    this.status = h("p");
    this.facts = h("div");
    this.output = h("div", { class: "output", role: "status" });
    this.load = h("button", { type: "button", click: () => this.samples() }, "Show the samples");
    this.remove = h("div", { class: "row" });
    this.element = h("div", null, this.status, this.facts, h("h3", null, "Samples"), this.load, this.output, this.remove);
    this.draw();
  }

  title() { return state.groups.get(this.path)?.job ?? this.path; }

  draw() {
    const row = state.groups.get(this.path);
    if (!row) {
      if (state.summary) {
        this.status.replaceChildren("There is no such group any more.");
        this.facts.replaceChildren();
        this.remove.replaceChildren();
        this.load.hidden = true;
      }
      return;
    }
    if (this.row !== row) {
      this.row = row;
      this.load.hidden = row.expired === true;
      this.status.replaceChildren(h("span", { class: `state ${row.state}` }, word(row)),
        { late: ": a push is overdue", failed: ": the last push was refused, the samples are those of the one before", expired: ": its samples went with the TTL, push_up stays" }[row.state] ?? "");
      this.facts.replaceChildren(facts([
        ["Labels", [`job=${row.job}`, ...row.others].flatMap((pair) => [h("span", { class: "tag" }, pair), " "])],
        ["Last push", row.pushedAt ? [this.pushed = when(row.pushedAt), `, ${absolute(row.pushedAt)}`] : "none was taken"],
        ["Last refused", row.failedAt ? [this.failed = when(row.failedAt), `, ${absolute(row.failedAt)}`] : null],
        ["push_up", up(row) === "–" ? "none: it declares no interval" : up(row)],
        ["Interval", seconds(row.interval_seconds)],
        ["TTL", row.ttl_seconds ? seconds(row.ttl_seconds) : "none: it stays until it is deleted"],
        ["Expires in", row.expiresAt && !row.expired ? this.left = h("span", { title: absolute(row.expiresAt) }, countdown(row.expiresAt)) : null],
        ["Series", count(row.series)],
        ["Path", h("code", null, `/metrics/${row.path}`)],
      ]));
      this.remove.replaceChildren(...(state.may.operate || state.may.push ? [h("button", { type: "button", class: "danger", click: () => this.ask() }, "Delete this group…")] : []));
    }
    if (this.pushed) touch(this.pushed, row.pushedAt);
    if (this.failed) touch(this.failed, row.failedAt);
    if (this.left && row.expiresAt) put(this.left, countdown(row.expiresAt));
  }

  update() {}

  async samples() {
    this.load.disabled = true;
    try {
      const response = await ask(`api/v1/groups/${this.path}`);
      const text = await response.text(), limit = 64 << 10;
      this.output.replaceChildren(h("p", { class: "muted" }, `${bytes(new Blob([text]).size)}${text.length > limit ? `; the first ${bytes(limit)}:` : ""}`),
        h("pre", { class: "samples", tabindex: 0, role: "group", "aria-label": "Samples" }, text.slice(0, limit)));
      put(this.load, "Load the samples again");
    } catch (error) {
      this.output.replaceChildren(h("p", { class: "why" }, error.message));
    } finally {
      this.load.disabled = false;
    }
  }

  async ask() {
    const row = this.row;
    const done = await confirmed({
      title: "Delete this group?", button: "Delete",
      body: h("div", null, h("p", null, [`job=${row.job}`, ...row.others].flatMap((pair) => [h("span", { class: "tag" }, pair), " "])),
        h("p", null, `${count(row.series)} series go at once, push_up too. Only a new push brings them back.`)),
      act: () => ask(`metrics/${row.path}`, { method: "DELETE" }),
    });
    if (done) this.act(`The group ${row.job} is deleted`);
  }
}

/** deleteMatching asks for a selector, shows what it would delete, and deletes it. */
export async function deleteMatching(act) {
  const selector = h("input", { name: "match", required: true, spellcheck: "false", autocomplete: "off", placeholder: '{job="nightly",instance=~"db-.*"}' });
  const found = h("div", { role: "status" });
  const why = h("p", { class: "why", role: "alert" });
  const dry = h("button", { type: "submit" }, "Show what would go");
  const go = h("button", { type: "button", class: "danger", disabled: true, click: () => run(false) }, "Delete");
  const form = h("form", { submit: (event) => { event.preventDefault(); run(true); } },
    h("label", null, "The groups whose labels match", selector), dry);
  const dialog = h("dialog", { "aria-labelledby": "dialog-title", close: () => dialog.remove() }, h("h2", { id: "dialog-title" }, "Delete groups by a selector"), form, found, why,
    h("div", { class: "row" }, h("button", { type: "button", click: () => dialog.close() }, "Cancel"), go));
  let shown = ""; // the selector whose groups were shown: no other is deleted
  selector.addEventListener("input", () => { go.disabled = selector.value !== shown || shown === ""; });
  async function run(isDry) {
    const match = isDry ? selector.value : shown;
    put(why, "");
    dry.disabled = go.disabled = true;
    try {
      const { groups } = await data(`api/v1/groups?${new URLSearchParams({ "match[]": match, dry_run: String(isDry) })}`, { method: "DELETE" });
      if (!isDry) {
        dialog.close();
        act(`${count(groups.length)} ${groups.length === 1 ? "group is" : "groups are"} deleted`);
        return;
      }
      shown = match;
      const name = (labels) => Object.entries(labels).sort(([a], [b]) => (a === "job" ? -1 : b === "job" ? 1 : a < b ? -1 : 1)).map(([n, v]) => `${n}=${v}`).join(" ");
      found.replaceChildren(h("p", null, groups.length ? `${count(groups.length)} of ${count(state.groups.size)} groups would go:` : "No group matches."),
        groups.length ? h("ul", { tabindex: 0, "aria-label": "Groups that would go" }, groups.slice(0, 500).map((labels) => h("li", null, name(labels)))) : "",
        groups.length > 500 ? h("p", null, `and ${count(groups.length - 500)} more`) : "");
      put(go, groups.length ? `Delete ${count(groups.length)} ${groups.length === 1 ? "group" : "groups"}` : "Delete");
      go.disabled = groups.length === 0;
    } catch (error) {
      put(why, error.message);
      if (isDry) found.replaceChildren();
    } finally {
      dry.disabled = false;
    }
  }
  document.body.append(dialog);
  dialog.showModal();
}
