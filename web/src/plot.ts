// One uPlot with what it lacks: the whole span of every bucket, dots on what stands out, marks on the step axis.
//
// A bucket of steps keeps its smallest and largest value; both are drawn as a stroke one device pixel wide, so
// a spike of a single step is on the screen at every zoom level. Values far outside the middle of the window
// get a dot as well. Nothing is clipped unless the reader asks for the robust scale, which counts what it hides.

import uPlot from "uplot";
import type { Window } from "./api";
import { axisValue, stepTicks } from "./format";
import { token } from "./palette";

export interface Trace {
  name: string;
  label: string;
  unit: string;
  color: string;
  window: Window;
  dash?: boolean;
}
export interface Mark {
  step: number;
  kind: "warning" | "critical" | "info" | "checkpoint" | "resume" | "focus";
}
export interface PlotOptions {
  log: boolean;
  robust: boolean;
  smooth: number; // share of the window that the smoothed line looks back over; 0: no smoothing
  marks: Mark[];
  height: number;
  small?: boolean;
  range?: [number, number]; // the steps to show, even where nothing was logged
  sync?: string;
  onZoom?: (start: number, stop: number) => void;
  onReset?: () => void;
  onCursor?: (index: number | null) => void;
  bounds?: [number, number]; // values the scale covers at least
}

export interface Spread {
  low: number;
  high: number;
  fence: [number, number]; // outside: an outlier
}

const up = (a: number, b: number) => a - b;

/** Where the values of a window lie: all of them, and the fence past which a value stands out. */
export function spread(window: Window, log = false): Spread {
  if (log) return measure(window, true);
  const known = spreads.get(window) ?? measure(window, false);
  spreads.set(window, known);
  return known;
}

const spreads = new WeakMap<Window, Spread>();

function measure(window: Window, log: boolean): Spread {
  let low = Infinity;
  let high = -Infinity;
  const lows: number[] = [];
  const highs: number[] = [];
  for (let i = 0; i < window.step.length; i++) {
    const a = window.low[i];
    const b = window.high[i];
    if (a === null || b === null || (log && b <= 0)) continue;
    if (!log || a > 0) low = Math.min(low, a);
    high = Math.max(high, b);
    lows.push(a);
    highs.push(b);
  }
  if (log && !Number.isFinite(low)) low = high;
  const at = (sorted: number[], q: number) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? 0;
  const [under, over] = [at(lows.sort(up), 0.01), at(highs.sort(up), 0.99)];
  const wide = Math.max(over - under, 1e-9 * Math.abs(over), 1e-30);
  return { low, high, fence: [under - 0.75 * wide, over + 0.75 * wide] };
}

const FEW = 500;

/** Whether a window has so few steps, each its own point, that the values themselves are the line. */
const bare = (window: Window) => window.raw && window.step.length <= FEW;

/** An exponential average that looks back over ``share`` of the window, of logarithms on a logarithmic scale. It never
 * looks ahead: a line that rises before its cause would point at the wrong step. Steps without a value do not count. */
export function smoothed(window: Window, share: number, log = false): (number | null)[] {
  const { step, mean } = window;
  if (!share || bare(window)) return mean;
  const reach = Math.max((step[step.length - 1] - step[0]) * share, 1e-9);
  let [sum, weight, before] = [0, 0, step[0]];
  return mean.map((m, i) => {
    const v = m === null || !Number.isFinite(m) || (log && m <= 0) ? null : log ? Math.log(m) : m;
    if (v === null) return null;
    const keep = Math.exp(-(step[i] - before) / reach);
    before = step[i];
    [sum, weight] = [sum * keep + v, weight * keep + 1];
    return log ? Math.exp(sum / weight) : sum / weight;
  });
}

/** How many buckets of a window the robust scale would leave out of the picture. */
export function hidden(traces: Trace[]): number {
  let count = 0;
  for (const { window } of traces) {
    const { fence } = spread(window);
    for (let i = 0; i < window.step.length; i++) {
      const a = window.low[i];
      const b = window.high[i];
      if (a !== null && b !== null && (a < fence[0] || b > fence[1])) count++;
    }
  }
  return count;
}

function bounds(traces: Trace[], o: PlotOptions): [number, number] {
  let low = Infinity;
  let high = -Infinity;
  for (const trace of traces) {
    const s = spread(trace.window, o.log);
    low = Math.min(low, o.robust ? Math.max(s.low, s.fence[0]) : s.low);
    high = Math.max(high, o.robust ? Math.min(s.high, s.fence[1]) : s.high);
  }
  if (o.bounds) [low, high] = [Math.min(low, o.bounds[0]), Math.max(high, o.bounds[1])];
  if (!Number.isFinite(low) || !Number.isFinite(high)) return o.log ? [0.1, 1] : [0, 1];
  if (o.log) return low > 0 ? [low / 1.08, Math.max(high, low * 1.01) * 1.08] : [0.1, 1];
  const pad = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.05 || 0.5;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
}

/** All steps of all traces once, ascending: uPlot wants one x column. */
function columns(traces: Trace[], smooth: number, log: boolean): uPlot.AlignedData {
  if (!traces.length) return [[0]];
  const first = traces[0].window.step;
  const same = traces.every((x) => x.window.step === first || equal(x.window.step, first));
  if (same) return [first, ...traces.map((x) => smoothed(x.window, smooth, log))] as uPlot.AlignedData;
  return uPlot.join(
    traces.map((x) => [x.window.step, smoothed(x.window, smooth, log)] as uPlot.AlignedData),
  );
}

const equal = (a: number[], b: number[]) => a.length === b.length && a.every((x, i) => x === b[i]);

function ticks(u: uPlot, axis: number, low: number, high: number, room: number, binary = false): number[] {
  const scale = u.axes[axis].scale === "y" && u.scales.y.distr === 3;
  if (scale && high / low > 8) {
    const out: number[] = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of high / low > 1e3 ? [1] : [1, 2, 5]) out.push(m * 10 ** e);
    return out.filter((x) => x >= low && x <= high);
  }
  const rough = (high - low) / Math.max(room, 2);
  const whole = binary ? 1024 ** Math.floor(Math.log2(Math.max(high, 1)) / 10) : 1;
  const unit = whole * 10 ** Math.floor(Math.log10(rough / whole));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= rough)!;
  const out: number[] = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-12); k++) out.push(Number((k * step).toPrecision(12)));
  return out;
}

export class Plot {
  readonly u: uPlot;
  private silent = false;

  constructor(
    readonly host: HTMLElement,
    public traces: Trace[],
    public options: PlotOptions,
  ) {
    this.u = new uPlot(this.config(), columns(traces, options.smooth, options.log), host);
    this.u.over.addEventListener("dblclick", () => this.options.onReset?.());
    touch(this.u);
  }

  set(traces: Trace[], options: PlotOptions): void {
    this.traces = traces;
    this.options = options;
    this.u.setData(columns(traces, options.smooth, options.log), true);
  }

  resize(width: number, height: number): void {
    if (width > 0 && (width !== this.u.width || height !== this.u.height)) this.u.setSize({ width, height });
  }

  private config(): uPlot.Options {
    const o = this.options;
    const grid = { stroke: token("grid"), width: 1 };
    const axis = { stroke: token("muted"), font: `11px ${token("font")}`, ticks: { show: false }, grid };
    const unit = this.traces[0]?.unit ?? "";
    const room = (u: uPlot, at: number) => (at === 0 ? u.bbox.width / devicePixelRatio / 84 : u.bbox.height / devicePixelRatio / 36);
    return {
      width: this.host.clientWidth || 300,
      height: o.height,
      padding: [8, o.small ? 18 : 14, o.small ? 0 : 2, 0],
      legend: { show: false },
      scales: {
        x: { time: false, range: (_u, a, b) => this.options.range ?? (a === b ? [a - 1, b + 1] : [a, b]) },
        y: { distr: o.log ? 3 : 1, range: () => bounds(this.traces, this.options) },
      },
      axes: [
        {
          ...axis,
          size: 24,
          gap: 4,
          splits: (u, i, a, b) => ticks(u, i, a, b, room(u, 0)).filter(Number.isInteger),
          filter: (_u, v) => v,
          values: (_u, v) => stepTicks(v),
        },
        {
          ...axis,
          size: o.small ? 44 : 54,
          gap: 6,
          splits: (u, i, a, b) => ticks(u, i, a, b, room(u, 1), unit === "bytes"),
          filter: (_u, v) => v,
          values: (_u, v) => v.map((x) => axisValue(x, unit, v.length > 1 ? Math.abs(v[1] - v[0]) : 0)),
        },
      ],
      series: [
        {},
        ...this.traces.map((trace) => ({
          stroke: trace.color,
          width: 1.8,
          dash: trace.dash ? [6, 4] : undefined,
          spanGaps: true,
          points: { show: trace.window.step.length < 3, size: 5 },
        })),
      ],
      cursor: {
        sync: o.sync ? { key: o.sync, setSeries: false } : undefined,
        drag: { x: Boolean(o.onZoom), y: false, setScale: false },
        points: { size: 7, width: 2, stroke: token("surface"), fill: (_u, i) => this.traces[i - 1]?.color ?? "" },
        y: false,
      },
      hooks: {
        drawAxes: [() => this.under()],
        draw: [() => this.over()],
        setSelect: [() => this.selected()],
        setCursor: [(u) => this.options.onCursor?.(u.cursor.idx ?? null)],
      },
    };
  }

  private selected(): void {
    const { left, width } = this.u.select;
    if (this.silent || width < 4) return;
    const a = this.u.posToVal(left, "x");
    const b = this.u.posToVal(left + width, "x");
    this.silent = true;
    this.u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.silent = false;
    this.options.onZoom?.(Math.floor(a), Math.ceil(b));
  }

  private clip(draw: (c: CanvasRenderingContext2D, u: uPlot) => void): void {
    const { ctx, bbox } = this.u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    draw(ctx, this.u);
    ctx.restore();
  }

  private under(): void {
    this.clip((c, u) => {
      for (const mark of this.options.marks) drawMark(c, u, mark);
      for (const trace of this.traces) drawSpan(c, u, trace, this.options, this.traces.length);
    });
  }

  private over(): void {
    this.clip((c, u) => {
      for (const trace of this.traces) {
        drawOutliers(c, u, trace, this.options);
        drawLost(c, u, trace);
      }
    });
  }
}

function drawMark(c: CanvasRenderingContext2D, u: uPlot, mark: Mark): void {
  const x = Math.round(u.valToPos(mark.step, "x", true)) + 0.5;
  const { left, top, width, height } = u.bbox;
  if (x < left || x > left + width) return;
  const quiet = mark.kind === "checkpoint";
  c.strokeStyle = token(mark.kind === "resume" ? "muted" : mark.kind === "focus" ? "text" : quiet ? "line" : mark.kind);
  c.globalAlpha = quiet ? 0.8 : 0.65;
  c.lineWidth = devicePixelRatio;
  c.setLineDash(mark.kind === "resume" ? [2, 4] : mark.kind === "focus" ? [] : [5, 4]);
  c.beginPath();
  c.moveTo(x, quiet ? top + height - 6 * devicePixelRatio : top);
  c.lineTo(x, top + height);
  c.stroke();
  c.setLineDash([]);
  c.globalAlpha = 1;
}

/** The smallest and largest value of every bucket as one stroke: M4's idea, drawn before the smoothed line. */
function drawSpan(c: CanvasRenderingContext2D, u: uPlot, trace: Trace, o: PlotOptions, among: number): void {
  const { step, low, high } = trace.window;
  const floor = o.log ? u.scales.y.min! : -Infinity;
  c.strokeStyle = trace.color;
  c.globalAlpha = o.smooth && !bare(trace.window) ? (among > 3 ? 0.1 : among > 1 ? 0.18 : 0.3) : 0.75;
  c.lineWidth = devicePixelRatio;
  c.lineJoin = "round";
  c.beginPath();
  let drawing = false;
  let last = 0;
  for (let i = 0; i < step.length; i++) {
    const a = low[i];
    const b = high[i];
    if (a === null || b === null || (o.log && b <= 0)) {
      drawing = false;
      continue;
    }
    const x = u.valToPos(step[i], "x", true);
    const ya = u.valToPos(Math.max(a, floor), "y", true);
    const yb = u.valToPos(Math.max(b, floor), "y", true);
    const [near, far] = Math.abs(last - ya) < Math.abs(last - yb) ? [ya, yb] : [yb, ya];
    if (drawing) c.lineTo(x, near);
    else c.moveTo(x, near);
    c.lineTo(x, far);
    last = far;
    drawing = true;
  }
  c.stroke();
  c.globalAlpha = 1;
}

function drawOutliers(c: CanvasRenderingContext2D, u: uPlot, trace: Trace, o: PlotOptions): void {
  const { step, low, high } = trace.window;
  const { fence } = spread(trace.window, o.log);
  const radius = 2.6 * devicePixelRatio;
  const { top, height } = u.bbox;
  let drawn = 0;
  c.fillStyle = trace.color;
  for (let i = 0; i < step.length && drawn < 400; i++) {
    const a = low[i];
    const b = high[i];
    if (a === null || b === null || (a >= fence[0] && b <= fence[1]) || (o.log && b <= 0)) continue;
    if (!alone(high, i, fence[1] - fence[0], 1) && !alone(low, i, fence[1] - fence[0], -1)) continue;
    const x = u.valToPos(step[i], "x", true);
    const y = u.valToPos(b > fence[1] ? b : a, "y", true);
    drawn++;
    c.beginPath();
    c.moveTo(x, u.valToPos(a, "y", true));
    c.lineTo(x, u.valToPos(b, "y", true));
    c.strokeStyle = trace.color;
    c.lineWidth = devicePixelRatio;
    c.stroke();
    c.strokeStyle = token("surface");
    c.beginPath();
    if (y < top || y > top + height) edge(c, x, y < top ? top : top + height, y < top ? 1 : -1, radius * 1.4);
    else c.arc(x, y, radius, 0, 2 * Math.PI);
    c.fill();
    c.stroke();
  }
}

/** Whether a value stands alone: at least a tenth of the fence beyond both sides, two to four buckets away. */
function alone(values: (number | null)[], i: number, wide: number, way: 1 | -1): boolean {
  const v = values[i];
  if (v === null || i < 2) return false; // a run's first values have nothing to stand out from
  const side = (from: number, to: number) => {
    let most = -Infinity;
    for (let k = from; k <= to; k++) most = Math.max(most, (values[k] ?? -Infinity * way) * way);
    return most;
  };
  return v * way - side(i - 4, i - 2) > wide / 10 && v * way - side(i + 2, i + 4) > wide / 10;
}

/** A small triangle at the border: a value lies beyond it (only the robust scale hides any). */
function edge(c: CanvasRenderingContext2D, x: number, y: number, way: number, size: number): void {
  c.moveTo(x, y);
  c.lineTo(x - size, y + way * size * 1.5);
  c.lineTo(x + size, y + way * size * 1.5);
  c.closePath();
}

/** NaN and infinities have no height: a cross at the top says where they were. */
function drawLost(c: CanvasRenderingContext2D, u: uPlot, trace: Trace): void {
  const size = 4 * devicePixelRatio;
  const y = u.bbox.top + size + 2;
  c.strokeStyle = token("critical");
  c.lineWidth = 2 * devicePixelRatio;
  for (const [step] of (trace.window.nonfinite ?? []).slice(0, 400)) {
    const x = u.valToPos(step, "x", true);
    c.beginPath();
    c.moveTo(x - size, y - size);
    c.lineTo(x + size, y + size);
    c.moveTo(x + size, y - size);
    c.lineTo(x - size, y + size);
    c.stroke();
  }
}

/** A finger moves the cursor along; scrolling up and down stays the browser's. */
function touch(u: uPlot): void {
  u.over.style.touchAction = "pan-y pinch-zoom";
  u.over.addEventListener("pointermove", (e) => {
    if (e.pointerType !== "touch") return;
    const box = u.over.getBoundingClientRect();
    u.setCursor({ left: e.clientX - box.left, top: e.clientY - box.top });
  });
}
