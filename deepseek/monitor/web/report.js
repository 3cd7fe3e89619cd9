"use strict";
/* Draws each chart again for the real width, with a crosshair, values and zoom shared by all charts of the page.
   Everything is built with createElement and textContent: no text of the run is ever parsed as markup. */
(() => {
  const L = 50, R = 14, T = 14, B = 26;
  const charts = [];
  let view = null, cursor = null;

  const make = (name, attributes, parent, text) => {
    const svg = ["svg", "path", "text", "rect", "circle", "g", "image", "title", "clipPath", "defs"].includes(name);
    const node = svg ? document.createElementNS(namespace, name) : document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const namespace = (document.querySelector("figure.chart svg") || {}).namespaceURI;
  if (!namespace) return;

  const label = (v) => {
    if (v === 0) return "0";
    const a = Math.abs(v), units = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    if (a >= 1e4) for (const [size, name] of units) if (a >= size) return parseFloat((v / size).toPrecision(4)) + name;
    return a < 1e-4 ? v.toExponential(2).replace(/\.?0+e/, "e") : String(parseFloat(v.toPrecision(6)));
  };
  const linear = (low, high, count) => {
    const raw = (high - low) / Math.max(count, 1);
    if (!(raw > 0)) return [low];
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = ([1, 2, 5].find((m) => m * power >= raw) || 10) * power, out = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) out.push(+(i * step).toPrecision(12));
    return out;
  };
  const powers = (low, high, count) => {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), out = [];
    const every = Math.max(Math.floor((last - first) / count), 1), multiples = last - first > 3 ? [1] : [1, 2, 5];
    for (let p = first; p <= last; p += every) for (const m of multiples) out.push(m * 10 ** p);
    return out.filter((t) => t >= low && t <= high);
  };
  const find = (xs, x) => { // index of the entry nearest to x in a sorted list
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] <= x) a = m; else b = m; }
    return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
  };
  const extremes = (points, columns, x0, x1) => { // lowest and highest of each pixel column, like thin() in charts.py
    if (points.length <= 2 * columns) return points;
    const out = []; let bucket = -1, low = null, high = null;
    const flush = () => { if (low) { if (low === high) out.push(low); else out.push(...(low[0] < high[0] ? [low, high] : [high, low])); } };
    for (const p of points) {
      const b = Math.floor((p[0] - x0) / (x1 - x0) * columns);
      if (b !== bucket) { flush(); bucket = b; low = high = p; }
      if (p[1] < low[1]) low = p;
      if (p[1] > high[1]) high = p;
    }
    flush();
    return out;
  };

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.svg = figure.querySelector("svg");
      this.data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
      this.log = this.data.log;
      this.image = (this.svg.querySelector("image") || {}).href;
      this.image = this.image && this.image.baseVal;
      this.name = this.svg.getAttribute("aria-label");
      this.clip = "clip-" + charts.length;
      this.svg.setAttribute("tabindex", "0");
      this.tip = make("div", { class: "tip", hidden: "" }, figure);
      if (this.data.kind === "lines" && !this.data.bounds && this.data.lines.every((l) => l.y.every((y) => y > 0))) this.addScaleButton();
      this.listen();
    }
    addScaleButton() {
      const button = make("button", { class: "scale", type: "button", title: "logarithmic or linear scale" }, this.figure.querySelector("figcaption"));
      const show = () => { button.textContent = this.log ? "log" : "linear"; };
      button.addEventListener("click", () => { this.log = !this.log; show(); this.draw(); });
      show();
    }
    range() { return view || all; }
    draw() {
      const width = Math.max(this.svg.clientWidth, 240), height = this.data.height || (width < 420 ? 200 : 230);
      const [x0, x1] = this.range(), svg = this.svg;
      this.width = width; this.height = height;
      this.x = (v) => L + (v - x0) / (x1 - x0) * (width - L - R);
      this.at = (px) => x0 + (px - L) / (width - L - R) * (x1 - x0);
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const clip = make("clipPath", { id: this.clip }, make("defs", {}, svg));
      make("rect", { x: L, y: 0, width: width - L - R, height: height - B + 1 }, clip);
      if (this.data.kind === "lines") this.drawLines(x0, x1); else this.drawHeat();
      make("path", { class: "axis", d: `M${L} ${height - B}H${width - R}` }, svg);
      for (const t of linear(x0, x1, width < 420 ? 4 : 6))
        make("text", { x: this.x(t), y: height - B + 17, "text-anchor": "middle" }, svg, label(t));
      for (const stop of this.data.breaks) if (stop.x >= x0 && stop.x <= x1) {
        const g = make("g", {}, svg), px = this.x(stop.x);
        make("title", {}, g, stop.text);
        make("path", { class: "break", d: `M${px} ${T - 6}V${height - B}` }, g);
        make("path", { class: "flag", d: `M${px} ${T - 10}l7 4l-7 4z` }, g);
        if (this.data.breaks.length < 4) {
          const left = px > width - 110;
          make("text", { class: "mark", x: px + (left ? -5 : 11), y: T - 3, "text-anchor": left ? "end" : "start" }, g, stop.label);
        }
      }
      this.over = make("g", {}, svg);
      this.point();
    }
    drawLines(x0, x1) {
      const { svg, width, height, data } = this, shown = [];
      let low = Infinity, high = -Infinity;
      for (const line of data.lines) {
        const points = [], n = line.x.length;
        for (let i = 0; i < n; i++) // with one neighbour outside on each side, so that lines reach the edges
          if ((i + 1 < n ? line.x[i + 1] : line.x[i]) >= x0 && (i ? line.x[i - 1] : line.x[i]) <= x1) points.push([line.x[i], line.y[i]]);
        for (const p of points) if (p[0] >= x0 && p[0] <= x1) { low = Math.min(low, p[1]); high = Math.max(high, p[1]); }
        shown.push([line, points]);
      }
      const bounds = this.log ? null : data.bounds;
      if (bounds) { low = Math.min(low, bounds[0]); high = Math.max(high, bounds[1]); }
      if (!(low <= high)) { low = this.log ? 0.1 : 0; high = 1; }
      if (this.log) { const pad = Math.max((high / low) ** 0.05, 1.05); low /= pad; high *= pad; }
      else { const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1; if (!bounds || low !== bounds[0]) low -= pad; high += pad; }
      const f = this.log ? Math.log : (v) => v, a = f(low), b = f(high);
      this.y = (v) => height - B - (f(v) - a) / (b - a) * (height - T - B);
      for (const t of (this.log ? powers : linear)(low, high, 5)) {
        make("path", { class: "grid", d: `M${L} ${this.y(t)}H${width - R}` }, svg);
        make("text", { x: L - 7, y: this.y(t), dy: "0.32em", "text-anchor": "end" }, svg, label(t));
      }
      const inside = make("g", { "clip-path": `url(#${this.clip})` }, svg);
      for (const [line, points] of shown) {
        if (line.style === "dots" || line.x.length === 1)
          for (const p of points.filter((q) => q[0] >= x0 && q[0] <= x1)) make("circle", { class: `dot f${line.color}`, cx: this.x(p[0]), cy: this.y(p[1]), r: 3.5 }, svg);
        else if (points.length)
          make("path", { class: `line s${line.color} ${line.style}`, d: "M" + extremes(points, width - L - R, x0, x1).map((p) => this.x(p[0]).toFixed(1) + " " + this.y(p[1]).toFixed(1)).join("L") }, inside);
      }
      for (const x of data.lost) if (x >= x0 && x <= x1) make("path", { class: "lost", d: `M${this.x(x)} ${T + 8}l-4 -8h8z` }, svg);
    }
    drawHeat() {
      const { svg, width, height, data } = this, [a, b] = data.x;
      const inside = make("g", { "clip-path": `url(#${this.clip})` }, svg);
      make("image", { href: this.image, x: this.x(a), y: T, width: Math.max(this.x(b) - this.x(a), 1), height: height - T - B, preserveAspectRatio: "none" }, inside);
      make("rect", { class: "frame", x: L, y: T, width: width - L - R, height: height - T - B }, svg);
      for (const row of new Set([0, data.rows - 1]))
        make("text", { x: L - 7, y: T + (row + 0.5) / data.rows * (height - T - B), dy: "0.32em", "text-anchor": "end" }, svg, row);
    }
    point() {
      if (!this.over) return;
      this.over.replaceChildren();
      this.tip.hidden = true;
      if (!cursor) return;
      const [x0, x1] = this.range();
      if (cursor.x < x0 || cursor.x > x1) return;
      const px = this.x(cursor.x);
      make("path", { class: "cross", d: `M${px} ${T}V${this.height - B}` }, this.over);
      if (this.data.kind === "lines") for (const line of this.data.lines) {
        const i = find(line.x, cursor.x);
        if (line.style !== "dots" && Math.abs(this.x(line.x[i]) - px) < 12) make("circle", { class: `dot f${line.color}`, cx: this.x(line.x[i]), cy: this.y(line.y[i]), r: 3.5 }, this.over);
      }
      if (cursor.chart === this) this.tell(px);
    }
    tell(px) {
      const tip = this.tip, near = (x) => Math.abs(this.x(x) - px) < 12;
      tip.replaceChildren();
      make("b", {}, tip, "step " + Math.round(cursor.x).toLocaleString("en"));
      if (this.data.kind === "lines") for (const line of this.data.lines) {
        const i = find(line.x, cursor.x);
        if (!near(line.x[i])) continue;
        const row = make("div", {}, tip);
        make("i", { class: `key k${line.color} ${line.style}` }, row);
        row.append(`${line.name} ${parseFloat(line.y[i].toPrecision(5))}`);
      } else {
        const [a, b] = this.data.x, grid = this.data.grid;
        const column = grid[Math.min(Math.max(Math.floor((cursor.x - a) / (b - a) * grid.length), 0), grid.length - 1)];
        const row = cursor.y === undefined ? 0 : Math.min(Math.max(Math.floor((cursor.y - T) / (this.height - T - B) * this.data.rows), 0), this.data.rows - 1);
        make("div", {}, tip, `expert ${row}: ${column[row].toFixed(2)} × the mean`);
      }
      for (const x of this.data.lost || []) if (near(x)) make("span", {}, tip, `not finite at step ${x}`);
      for (const stop of this.data.breaks) if (near(stop.x)) make("span", {}, tip, stop.text);
      tip.hidden = false;
      const box = this.svg.getBoundingClientRect(), outer = this.figure.getBoundingClientRect();
      const left = box.left - outer.left + px + 14, flip = left + tip.offsetWidth > outer.width - 6;
      tip.style.left = Math.max(flip ? left - 28 - tip.offsetWidth : left, 6) + "px";
      tip.style.top = box.top - outer.top + T + 4 + "px";
    }
    steps() { return this.data.kind === "lines" ? this.data.lines[0].x : Array.from(this.data.grid, (_, i) => this.data.x[0] + (i + 0.5) / this.data.grid.length * (this.data.x[1] - this.data.x[0])); }
    snap(x) { const xs = this.steps(); return xs[find(xs, x)]; }
    listen() {
      const svg = this.svg;
      let start = null;
      const place = (e) => { const box = svg.getBoundingClientRect(); return [Math.min(Math.max(e.clientX - box.left, L), this.width - R), e.clientY - box.top]; };
      svg.addEventListener("pointermove", (e) => {
        const [px, y] = place(e);
        cursor = { x: this.snap(this.at(px)), y, chart: this };
        refresh();
        if (start !== null) make("rect", { class: "select", x: Math.min(start, px), y: T, width: Math.abs(px - start), height: this.height - T - B }, this.over);
      });
      svg.addEventListener("pointerdown", (e) => { if (e.button === 0 && e.pointerType !== "touch") { start = place(e)[0]; svg.setPointerCapture(e.pointerId); e.preventDefault(); svg.focus({ preventScroll: true }); } });
      svg.addEventListener("pointerup", (e) => {
        const end = place(e)[0];
        if (start !== null && Math.abs(end - start) > 6) { const a = this.at(Math.min(start, end)), b = this.at(Math.max(start, end)); if (b - a >= 1) zoom([a, b]); }
        start = null;
      });
      svg.addEventListener("pointerleave", () => { if (start === null) { cursor = null; refresh(); } });
      svg.addEventListener("dblclick", () => zoom(null));
      svg.addEventListener("blur", () => { cursor = null; refresh(); });
      svg.addEventListener("keydown", (e) => {
        const xs = this.steps(), at = cursor ? find(xs, cursor.x) : 0;
        const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: xs.length - 1, PageUp: at - 20, PageDown: at + 20 }[e.key];
        if (e.key === "Escape") zoom(null);
        if (to === undefined) return;
        e.preventDefault();
        cursor = { x: xs[Math.min(Math.max(to, 0), xs.length - 1)], chart: this };
        refresh();
      });
    }
  }

  let waiting = false;
  const refresh = () => charts.forEach((c) => c.point());
  const redraw = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; charts.forEach((c) => c.draw()); }); } };
  const zoom = (range) => {
    view = range;
    tools.hidden = !range;
    if (range) shown.textContent = `steps ${Math.round(range[0]).toLocaleString("en")} to ${Math.round(range[1]).toLocaleString("en")}`;
    charts.forEach((c) => c.draw());
  };

  document.documentElement.classList.add("live");
  document.querySelectorAll("figure.chart").forEach((figure) => charts.push(new Chart(figure)));
  const all = [Math.min(...charts.map((c) => c.data.x[0])), Math.max(...charts.map((c) => c.data.x[1]))];
  const tools = make("div", { class: "tools", hidden: "" });
  const shown = make("span", {}, tools);
  make("button", { type: "button" }, tools, "show all").addEventListener("click", () => zoom(null));
  document.querySelector("main").prepend(tools);
  const hint = make("p", { class: "note" }, null, "Drag across a chart to zoom all of them; double-click or Escape shows everything again. Arrow keys move the crosshair.");
  const first = document.querySelector("section h2 + .grid");
  if (first) first.before(hint);
  charts.forEach((c) => c.draw());
  new ResizeObserver(redraw).observe(document.querySelector("main"));
  document.querySelectorAll("details").forEach((d) => d.addEventListener("toggle", redraw));
  addEventListener("beforeprint", () => { cursor = null; charts.forEach((c) => c.draw()); });
})();
