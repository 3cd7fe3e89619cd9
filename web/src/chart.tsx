// A plot with its legend: what stands under the cursor is written above it, for the eye and for screen readers.

import { useEffect, useRef, useState } from "preact/hooks";
import { useCell } from "./cell";
import { atStep, measured } from "./format";
import { dark } from "./palette";
import { type Mark, Plot, type PlotOptions, type Trace } from "./plot";
import { t, useLang } from "./text";

interface Props extends Omit<PlotOptions, "onCursor" | "marks"> {
  traces: Trace[];
  marks?: Mark[];
  title: string;
  legend?: boolean;
}

const NONE: Mark[] = [];

export function Chart({ traces, title, legend = true, marks = NONE, ...rest }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<Plot | null>(null);
  const [index, setIndex] = useState<number | null>(null);
  const isDark = useCell(dark);
  useLang();
  const options: PlotOptions = { ...rest, marks, onCursor: setIndex };
  const shape = JSON.stringify([traces.map((x) => [x.name, x.color, x.unit]), rest.log, isDark, rest.sync, Boolean(rest.onZoom)]);

  useEffect(() => {
    const box = host.current!;
    plot.current = new Plot(box, traces, options);
    const watcher = new ResizeObserver(() => plot.current?.resize(box.clientWidth, plot.current.options.height));
    watcher.observe(box);
    return () => {
      watcher.disconnect();
      plot.current?.u.destroy();
      plot.current = null;
    };
  }, [shape]);

  const drawn = useRef("");
  useEffect(() => {
    const fresh = drawn.current !== shape; // the effect above has just drawn it
    drawn.current = shape;
    if (!plot.current || !host.current) return;
    plot.current.options = options;
    if (!fresh) plot.current.set(traces, options);
    plot.current.resize(host.current.clientWidth, rest.height);
  }, [shape, ...traces.map((x) => x.window), rest.robust, rest.smooth, rest.height, rest.range?.[0], rest.range?.[1], marks]);

  const shown = index ?? -1;
  return (
    <figure
      class="chart"
      tabIndex={0}
      aria-label={`${title}. ${traces.map(spoken).join("; ")}. ${t("Arrow keys move the cursor, + and − zoom, 0 shows all.")}`}
      onKeyDown={(e) => plot.current && keys(e, plot.current)}
    >
      {legend && (
        <figcaption class="legend" aria-live={index === null ? "off" : "polite"}>
          <span class="at">{index === null ? t("last") : `${atStep(stepAt(plot.current, shown))}`}</span>
          {traces.slice(0, 8).map((trace) => (
            <Readout key={trace.name} trace={trace} step={index === null ? null : stepAt(plot.current, shown)} alone={traces.length === 1} bare={traces.length > 2} />
          ))}
          {traces.length > 8 && <span>+{traces.length - 8}</span>}
        </figcaption>
      )}
      <div class="plot" ref={host} />
    </figure>
  );
}

const stepAt = (plot: Plot | null, index: number) => plot?.u.data[0][index] ?? null;

function Readout({ trace, step, alone, bare }: { trace: Trace; step: number | null; alone: boolean; bare: boolean }) {
  const { window, unit, label, color } = trace;
  const i = step === null ? lastFinite(window.mean) : nearest(window.step, step);
  const [low, high, mean] = [window.low[i], window.high[i], window.mean[i]];
  const wide = !bare && !window.raw && low !== null && high !== null && low !== high && low !== undefined;
  return (
    <span class="readout">
      <i class="key" style={{ background: color }} aria-hidden="true" />
      {!alone && <span class="name">{label}</span>}
      <b>{measured(mean, unit)}</b>
      {wide && (
        <small>
          {measured(low, unit)} … {measured(high, unit)}
        </small>
      )}
    </span>
  );
}

function lastFinite(values: (number | null)[]): number {
  let i = values.length - 1;
  while (i > 0 && values[i] === null) i--;
  return i;
}

export function nearest(steps: number[], step: number): number {
  let a = 0;
  let b = steps.length - 1;
  while (b - a > 1) {
    const m = (a + b) >> 1;
    if (steps[m] <= step) a = m;
    else b = m;
  }
  return Math.abs(steps[a] - step) <= Math.abs(steps[b] - step) ? a : b;
}

function spoken(trace: Trace): string {
  const { low, high, mean } = trace.window;
  const known = (xs: (number | null)[]) => xs.filter((x): x is number => x !== null);
  const [lows, highs] = [known(low), known(high)];
  if (!lows.length) return `${trace.label}: ${t("no values")}`;
  const least = lows.reduce((a, b) => Math.min(a, b));
  const most = highs.reduce((a, b) => Math.max(a, b));
  const last = measured(mean[lastFinite(mean)], trace.unit);
  return `${trace.label}: ${t("last {last}, least {low}, most {high}", { last, low: measured(least, trace.unit), high: measured(most, trace.unit) })}`;
}

function keys(e: KeyboardEvent, { u, options }: Plot): void {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const steps = u.data[0];
  const jump = e.shiftKey ? Math.max(1, Math.round(steps.length / 20)) : 1;
  const [a, b] = [u.scales.x.min!, u.scales.x.max!];
  const at = u.cursor.idx ?? null;
  const move = (i: number) => {
    const index = Math.min(Math.max(i, 0), steps.length - 1);
    u.setCursor({ left: u.valToPos(steps[index], "x"), top: u.over.clientHeight / 2 });
  };
  const zoom = (factor: number) => {
    const middle = at === null ? (a + b) / 2 : steps[at];
    options.onZoom?.(Math.floor(middle - (middle - a) * factor), Math.ceil(middle + (b - middle) * factor));
  };
  const done: Record<string, () => void> = {
    ArrowLeft: () => move((at ?? steps.length) - jump),
    ArrowRight: () => move((at ?? -1) + jump),
    Home: () => move(0),
    End: () => move(steps.length - 1),
    "+": () => zoom(0.5),
    "=": () => zoom(0.5),
    "-": () => zoom(2),
    "0": () => options.onReset?.(),
  };
  if (!done[e.key]) return;
  done[e.key]();
  e.preventDefault();
  e.stopPropagation();
}
