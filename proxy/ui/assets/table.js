import { h, set } from "./dom.js";

/**
 * VirtualTable shows thousands of rows of one height in a real <table>: only those in
 * view, and some around them, are elements. Rows are told apart by their keys; one that
 * stays keeps its element, and with it focus and selection. The link in a row's <th> is
 * what is focused; one of them all is in the tab order.
 */
export class VirtualTable {
  /**
   * make makes a row's <tr>, fill brings it up to date, open is called for a row that was
   * chosen, seen when other rows came into view.
   */
  constructor({ scroller, table, key, make, fill, open, seen }) {
    Object.assign(this, { scroller, table, key, make, fill, open, seen });
    this.rows = [];
    this.index = new Map();
    this.elements = new Map();
    this.current = null; // key of the row in the tab order
    this.focused = null; // key of the row that has, or had when it was scrolled away, the focus
    this.chosen = null;
    this.above = this.space();
    this.below = this.space();
    this.body = h("tbody", {
      click: (event) => this.click(event),
      keydown: (event) => this.keydown(event),
      focusin: (event) => {
        this.current = this.focused = event.target.closest("tr").key;
        this.stops();
      },
      focusout: () => { if (!this.rendering) this.focused = null; },
    });
    for (const old of [...table.tBodies]) old.remove();
    set(table.tHead.rows[0], "aria-rowindex", "1");
    table.append(this.above, this.body, this.below);
    this.abort = new AbortController();
    const options = { signal: this.abort.signal, passive: true };
    this.frame = 0; // that is asked for, to render in
    const later = () => { this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.render(); }); };
    scroller.addEventListener("scroll", later, options);
    this.resize = new ResizeObserver(later);
    this.resize.observe(scroller);
  }

  space() {
    // Not across the columns: some may be hidden, and would come back.
    return h("tbody", { class: "space", "aria-hidden": "true" }, h("tr", null, h("td")));
  }

  /** end frees what the table listens to. Out of the page rows have no height: nothing is rendered any more. */
  end() {
    this.abort.abort();
    this.resize.disconnect();
    cancelAnimationFrame(this.frame);
  }

  /** show takes other rows. With keep, the first row in view stays where it is. */
  show(rows, keep) {
    const height = this.height();
    const top = Math.ceil(this.scroller.scrollTop / height);
    const focusedAt = this.index.get(this.focused);
    const anchor = keep && this.scroller.scrollTop > 0 ? this.rows[top] : null;
    this.rows = rows;
    this.index = new Map(rows.map((row, i) => [this.key(row), i]));
    set(this.table, "aria-rowcount", String(rows.length + 1));
    if (anchor) {
      const now = this.index.get(this.key(anchor));
      if (now !== undefined && now !== top) {
        this.size(0, height); // so that there is room to scroll to
        this.scroller.scrollTop += (now - top) * height;
      }
    }
    this.render();
    // Where the row with the focus is gone, the one that has taken its place gets it.
    if (this.focused !== null && !this.index.has(this.focused) && document.activeElement === document.body && rows.length) {
      this.focus(this.key(rows[Math.min(focusedAt, rows.length - 1)]));
    }
  }

  height() { return parseFloat(getComputedStyle(this.table).getPropertyValue("--row")); }

  size(first, height) {
    this.above.firstChild.firstChild.style.height = `${first * height}px`;
    this.above.hidden = first === 0;
    const rest = Math.max(0, this.rows.length - first - this.body.rows.length);
    this.below.firstChild.firstChild.style.height = `${rest * height}px`;
    this.below.hidden = rest === 0;
  }

  render() {
    const height = this.height();
    // What stands above the rows sticks, so that the first one in view is told by the scroll alone.
    const top = this.scroller.scrollTop / height;
    const inView = Math.ceil(this.scroller.clientHeight / height);
    const first = Math.max(0, Math.min(Math.floor(top) - 10, this.rows.length - inView - 20));
    const last = Math.min(this.rows.length, Math.max(first, Math.floor(top) + inView + 10, first + inView + 20));
    this.first = Math.max(0, Math.floor(top));
    this.rendering = true;
    const wanted = new Map();
    for (let i = first; i < last; i++) wanted.set(this.key(this.rows[i]), i);
    for (const [key, tr] of this.elements) {
      if (!wanted.has(key)) {
        tr.remove();
        this.elements.delete(key);
      }
    }
    let place = this.body.firstChild;
    for (const [key, i] of wanted) {
      let tr = this.elements.get(key);
      if (!tr) {
        tr = this.make();
        tr.key = key;
        this.elements.set(key, tr);
      }
      if (tr.row !== this.rows[i]) {
        tr.row = this.rows[i];
        this.fill(tr, tr.row);
      }
      set(tr, "aria-rowindex", String(i + 2));
      tr.classList.toggle("chosen", key === this.chosen);
      if (tr === place) place = place.nextSibling;
      else this.body.insertBefore(tr, place);
    }
    this.size(first, height);
    this.stops();
    // Moving a row takes its focus away, and so does scrolling it out of view.
    if (this.focused !== null && document.activeElement === document.body) this.link(this.focused)?.focus({ preventScroll: true });
    this.rendering = false;
    this.seen?.();
  }

  /** refill brings all rows that are elements up to date, as time passes. */
  refill() { for (const tr of this.elements.values()) this.fill(tr, tr.row); }

  /** choose marks the row whose details are shown; null: none. */
  choose(key) {
    this.chosen = key;
    for (const [k, tr] of this.elements) tr.classList.toggle("chosen", k === key);
  }

  link(key) { return this.elements.get(key)?.querySelector("th a"); }

  /** stops leaves one link in the tab order. */
  stops() {
    let stop = this.elements.has(this.current) ? this.current : null;
    if (stop === null && this.rows.length) stop = this.key(this.rows[Math.min(this.first, this.rows.length - 1)]);
    for (const [key, tr] of this.elements) tr.querySelector("th a").tabIndex = key === stop ? 0 : -1;
  }

  /** focus moves the focus to a row, into view. */
  focus(key) {
    const i = this.index.get(key);
    if (i === undefined) return false;
    const height = this.height(), sticky = this.table.offsetTop + this.table.tHead.offsetHeight;
    const { scrollTop, clientHeight } = this.scroller;
    if (i * height < scrollTop) this.scroller.scrollTop = i * height;
    else if (sticky + (i + 1) * height > scrollTop + clientHeight) this.scroller.scrollTop = sticky + (i + 1) * height - clientHeight + 4;
    this.current = this.focused = key;
    this.render();
    this.link(key)?.focus({ preventScroll: true });
    return true;
  }

  /** visible returns the rows that are elements. */
  visible() { return [...this.elements.values()].map((tr) => tr.row); }

  click(event) {
    const tr = event.target.closest("tr");
    // A new tab, or a selection of text, is no wish to open it here.
    if (!tr || event.metaKey || event.ctrlKey || event.shiftKey || event.button !== 0) return;
    if (!event.target.closest("a") && String(getSelection()) !== "") return;
    event.preventDefault();
    this.current = tr.key;
    this.open(tr.row);
  }

  keydown(event) {
    const i = this.index.get(this.focused);
    if (i === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.height()) - 3);
    const to = { ArrowDown: i + 1, ArrowUp: i - 1, PageDown: i + page, PageUp: i - page, Home: 0, End: this.rows.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.focus(this.key(this.rows[Math.max(0, Math.min(to, this.rows.length - 1))]));
  }
}
