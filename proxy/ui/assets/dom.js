// What all modules need: elements, and numbers and times for people. Text from outside
// becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** h makes an element. Of the properties, functions are listeners, null and false none. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** s is h for SVG. */
export function s(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

/** put sets the text of an element where it is another one: a selection in it survives. */
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** set sets an attribute where it is another one; null takes it away. */
export function set(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

export const count = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, ",");

/** span is a duration in seconds, in one unit. */
export function span(seconds) {
  const d = Math.abs(seconds);
  if (d < 60) return `${Math.floor(d)} s`;
  if (d < 3600) return `${Math.floor(d / 60)} min`;
  if (d < 48 * 3600) return `${Math.floor(d / 3600)} h`;
  return `${Math.floor(d / 86400)} d`;
}

/** ago is how long ago a time in ms was, or how far ahead. */
export function ago(at) {
  if (!at) return "–";
  const seconds = (Date.now() - at) / 1000;
  if (Math.abs(seconds) < 1) return "now";
  return seconds > 0 ? `${span(seconds)} ago` : `in ${span(seconds)}`;
}

/** countdown is how far ahead a time in ms is, to the second. */
export function countdown(at) {
  const left = Math.max(0, Math.floor((at - Date.now()) / 1000));
  const two = (n) => String(n).padStart(2, "0");
  const clock = `${two(Math.floor(left / 3600) % 24)}:${two(Math.floor(left / 60) % 60)}:${two(left % 60)}`;
  return left >= 86400 ? `${Math.floor(left / 86400)} d ${clock}` : clock;
}

export const absolute = (at) => (at ? new Date(at).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC") : "");

/** seconds is a duration of a scrape or the like. */
export function seconds(value) {
  if (!value || value <= 0) return "–";
  if (value < 0.001) return `${(value * 1000).toFixed(2)} ms`;
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 60) return `${Number(value.toPrecision(3))} s`;
  return span(value);
}

export function bytes(n) {
  if (n === undefined || n === null) return "–";
  if (n < 1000) return `${n} B`;
  const exponent = Math.min(Math.floor(Math.log10(n) / 3), 4);
  return `${Number((n / 1000 ** exponent).toPrecision(3))} ${" kMGT"[exponent]}B`;
}

/** natural is a key that sorts by the value of the numbers in a text. */
export const natural = (text) => text.replace(/\d+/g, (digits) => digits.padStart(12, "0"));

/** when makes a <time> that touch keeps true. */
export function when(at) {
  const element = h("time");
  touch(element, at);
  return element;
}

/** touch sets what a <time> says. */
export function touch(element, at) {
  if (element.at !== at) {
    element.at = at;
    set(element, "datetime", at ? new Date(at).toISOString() : null);
    set(element, "title", at ? absolute(at) : null);
  }
  put(element, ago(at));
}

export const time = (text) => (text ? Date.parse(text) : 0);

export const tag = (name, value) => h("span", { class: "tag" }, `${name}=${value}`);

/** labels returns [name, value] pairs, sorted by name. */
export const labels = (object) => Object.entries(object ?? {}).sort(([a], [b]) => (a < b ? -1 : 1));

/** facts makes a list of names and values, without those that are null. */
export function facts(rows) {
  return h("dl", { class: "facts" }, rows.filter(([, v]) => v !== null && v !== undefined).map(([name, value]) => [h("dt", null, name), h("dd", null, value)]));
}

/** say has screen readers say a text, at most one in a while: the last one counts. */
export const say = (() => {
  let next = "", timer = 0, last = 0;
  return (text, pause = 1000) => {
    next = text;
    if (timer) return;
    timer = setTimeout(() => {
      timer = 0;
      last = Date.now();
      put(document.getElementById("say"), next);
    }, Math.max(pause, last + 5000 - Date.now()));
  };
})();

/** Failure is an answer that is no success. */
export class Failure extends Error {
  constructor(status, code, text) {
    super(`${status}${code ? ` ${code}` : ""}: ${text || "no reason was given"}`);
    this.status = status;
  }
}

/** at is the address of a path relative to the page. Credentials that stand in the page's own one would keep fetch from it. */
export const at = (path) => new URL(path, location.origin + location.pathname);

/** ask sends a request and returns the response, or throws what is to be shown. */
export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(at(path), { cache: "no-store", signal: AbortSignal.timeout(30_000), ...options });
  } catch (error) {
    throw new Error(error.name === "TimeoutError" ? "the proxy did not answer in time" : "the proxy can't be reached", { cause: error });
  }
  if (!response.ok) {
    const text = (await response.text().catch(() => "")).trim();
    throw new Failure(response.status, response.headers.get("Culvert-Error"), text.slice(0, 2000));
  }
  return response;
}

/** data returns what the API's envelope holds. */
export async function data(path, options) {
  const response = await ask(path, options);
  try {
    return (await response.json()).data;
  } catch (error) {
    throw new Error("the proxy's answer broke off, or is no JSON", { cause: error });
  }
}

/** confirmed asks in a dialog, and resolves to whether act was done. act may throw what is to be shown. */
export function confirmed({ title, body, button, act }) {
  return new Promise((resolve) => {
    const why = h("p", { class: "why", role: "alert" });
    const cancel = h("button", { type: "button", autofocus: true, click: () => dialog.close() }, "Cancel");
    const go = h("button", { type: "button", class: "danger", click: run }, button);
    const dialog = h("dialog", { "aria-labelledby": "dialog-title", close: end }, h("h2", { id: "dialog-title" }, title), body, why, h("div", { class: "row" }, cancel, go));
    let done = false;
    async function run() {
      go.disabled = true;
      put(why, "");
      try {
        await act();
        done = true;
        dialog.close();
      } catch (error) {
        put(why, error.message);
        go.disabled = false;
      }
    }
    function end() {
      dialog.remove();
      resolve(done);
    }
    document.body.append(dialog);
    dialog.showModal();
  });
}
