// The whole run in one strip: loss, pins of incidents, checkpoints, resumes, and the window that all charts show.

import { useEffect, useRef, useState } from "preact/hooks";
import { type Incident, readSeries, type Window } from "./api";
import { useCell } from "./cell";
import { atStep, grouped } from "./format";
import { Icon, severityIcon } from "./icons";
import { dark, line } from "./palette";
import { spread } from "./plot";
import { link } from "./route";
import { checkpoints, resumes, useRun } from "./run";
import { t, titleOf } from "./text";

const MOST_PINS = 60;

export function Timeline({ series }: { series: string }) {
  const run = useRun();
  const beat = useCell(run.live.beat);
  const [window, setWindow] = useState<Window | null>(null);
  const strip = useRef<HTMLDivElement>(null);
  const [drag, setDrag] = useState<{ from: number; to: number; pan: boolean } | null>(null);
  useEffect(() => {
    let alive = true;
    readSeries(run.id, series, { points: 800 }).then((w) => alive && setWindow(w), () => undefined);
    return () => void (alive = false);
  }, [run.id, series, beat]);

  const [first, last] = run.extent;
  const share = (step: number) => (step - first) / Math.max(last - first, 1);
  const a = run.view.start ?? first;
  const b = Math.min(run.view.stop ?? last, last);
  const stepAt = (e: PointerEvent) => {
    const box = strip.current!.getBoundingClientRect();
    return first + Math.min(Math.max((e.clientX - box.left) / box.width, 0), 1) * (last - first);
  };
  const zoomed = run.view.start !== undefined || run.view.stop !== undefined;
  const down = (e: PointerEvent) => {
    if ((e.target as Element).closest("a")) return;
    const at = stepAt(e);
    strip.current!.setPointerCapture(e.pointerId);
    setDrag({ from: at, to: at, pan: zoomed && at > a && at < b });
  };
  const up = () => {
    if (!drag) return;
    const moved = drag.to - drag.from;
    if (drag.pan && Math.abs(moved) > 0) run.zoom(Math.round(a + moved), Math.round(b + moved));
    else if (Math.abs(share(drag.to) - share(drag.from)) > 0.004)
      run.zoom(Math.floor(Math.min(drag.from, drag.to)), Math.ceil(Math.max(drag.from, drag.to)));
    setDrag(null);
  };
  const shift = drag?.pan ? drag.to - drag.from : 0;
  const brush = drag && !drag.pan ? [Math.min(drag.from, drag.to), Math.max(drag.from, drag.to)] : [a + shift, b + shift];
  const width = b - a;
  const by = (x: number, y: number) => run.zoom(Math.round(Math.max(first, x)), Math.round(Math.min(last, y)));
  return (
    <section class="timeline" aria-label={t("The whole run")}>
      <div class="strip" ref={strip} onPointerDown={down} onPointerMove={(e) => drag && setDrag({ ...drag, to: stepAt(e) })} onPointerUp={up} onDblClick={() => run.zoom()}>
        <Silhouette window={window} extent={run.extent} />
        {resumes(run).map((step, i) => (
          <i key={`r${i}`} class="tl-resume" style={{ left: `${share(step) * 100}%` }} title={`${t("resumed")} · ${grouped(step)}`} />
        ))}
        {thinned(checkpoints(run).map((c) => c.step), 80).map((step) => (
          <i key={`c${step}`} class="tl-checkpoint" style={{ left: `${share(step) * 100}%` }} title={`${t("checkpoint")} · ${grouped(step)}`} />
        ))}
        {(zoomed || drag) && <i class="brush" style={{ left: `${share(brush[0]) * 100}%`, width: `${Math.max(share(brush[1]) - share(brush[0]), 0.001) * 100}%` }} />}
        <nav class="pins" aria-label={t("Incidents")}>
          {pinned(run.incidents).map((x) => (
            <a
              key={x.id}
              class={`pin ${x.severity} ${x.status}`}
              style={{ left: `${Math.min(Math.max(share(x.step), 0), 1) * 100}%` }}
              href={link(["run", run.id, "incidents", x.id])}
              aria-label={`${t(x.severity)}: ${titleOf(x.title)}, ${atStep(x.step)}`}
              title={`${titleOf(x.title)}\n${atStep(x.step)}`}
            >
              <Icon name={severityIcon(x.severity)} size={12} />
            </a>
          ))}
        </nav>
      </div>
      <div class="tl-tools">
        <span class="tl-range">
          {t("steps")} <b>{grouped(a)}</b> – <b>{grouped(b)}</b>
        </span>
        <Tool name="minus" label={t("Zoom out")} onClick={() => (width * 2 >= last - first ? run.zoom() : by(a - width / 2, b + width / 2))} />
        <Tool name="plus" label={t("Zoom in")} onClick={() => by(a + width / 4, b - width / 4)} />
        <Tool name="left" label={t("Earlier")} onClick={() => by(Math.max(first, a - width / 2), Math.max(first, a - width / 2) + width)} />
        <Tool name="right" label={t("Later")} onClick={() => by(Math.min(last, b + width / 2) - width, Math.min(last, b + width / 2))} />
        <Tool name="reset" label={t("Show the whole run")} onClick={() => run.zoom()} />
      </div>
    </section>
  );
}

function Tool({ name, label, onClick }: { name: string; label: string; onClick: () => void }) {
  return (
    <button type="button" class="icon-button" aria-label={label} title={label} onClick={onClick}>
      <Icon name={name} size={14} />
    </button>
  );
}

/** The worst and latest incidents: a strip that is all pins tells nothing. */
function pinned(all: Incident[]): Incident[] {
  const weight = (x: Incident) => (x.status === "open" ? 4 : 0) + { critical: 2, warning: 1, info: 0 }[x.severity];
  return [...all].sort((x, y) => weight(x) - weight(y) || x.step - y.step).slice(-MOST_PINS);
}

const thinned = (steps: number[], most: number) =>
  steps.length <= most ? steps : steps.filter((_, i) => i % Math.ceil(steps.length / most) === 0 || i === steps.length - 1);

function Silhouette({ window, extent }: { window: Window | null; extent: [number, number] }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const isDark = useCell(dark);
  useEffect(() => {
    const host = canvas.current!;
    const draw = () => silhouette(host, window, extent);
    draw();
    const watcher = new ResizeObserver(draw);
    watcher.observe(host);
    return () => watcher.disconnect();
  }, [window, extent[0], extent[1], isDark]);
  return <canvas ref={canvas} aria-hidden="true" />;
}

function silhouette(canvas: HTMLCanvasElement, window: Window | null, [first, last]: [number, number]): void {
  const ratio = devicePixelRatio;
  const [w, h] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio];
  canvas.width = w;
  canvas.height = h;
  const c = canvas.getContext("2d")!;
  if (!window?.step.length) return;
  const least = window.low.reduce<number>((m, v) => (v !== null && v < m ? v : m), Infinity);
  const { low, high } = spread(window);
  const scaled = least > 0 && high / low > 3 ? Math.log : (v: number) => v; // a long fall leaves room for the rest
  const [bottom, top] = [scaled(low), scaled(high)];
  const y = (v: number) => h - 5 * ratio - ((scaled(v) - bottom) / (top - bottom || 1)) * (h - 11 * ratio);
  c.strokeStyle = line(0);
  c.lineWidth = ratio;
  c.beginPath();
  window.step.forEach((step, i) => {
    const [a, b] = [window.low[i], window.high[i]];
    if (a === null || b === null) return;
    const x = ((step - first) / Math.max(last - first, 1)) * w;
    c.lineTo(x, y(a));
    c.lineTo(x, y(b));
  });
  c.stroke();
}
