// A card with a chart of one or more series: log and robust scale, smoothing, zoom, full width, and what the series mean.

import { useEffect, useRef, useState } from "preact/hooks";
import { Chart } from "./chart";
import { Icon } from "./icons";
import { line } from "./palette";
import { hidden, type Trace } from "./plot";
import { useMarks, useRun, useWindows } from "./run";
import { said, t } from "./text";

export interface PanelProps {
  names: string[];
  title?: string;
  labels?: Record<string, string>;
  log?: boolean;
  smooth?: number;
  height?: number;
  wide?: boolean;
  bounds?: [number, number];
  onRemove?: () => void;
}

export function useSeen(): [preact.RefObject<HTMLElement | null>, boolean] {
  const host = useRef<HTMLElement | null>(null);
  const [seen, setSeen] = useState(false);
  useEffect(() => {
    const watcher = new IntersectionObserver((x) => setSeen(x.some((e) => e.isIntersecting)), { rootMargin: "160px" });
    watcher.observe(host.current!);
    return () => watcher.disconnect();
  }, []);
  return [host, seen];
}

export function Panel({ names, title, labels = {}, log = false, smooth = 0.004, height = 210, wide = false, bounds, onRemove }: PanelProps) {
  const run = useRun();
  const [host, seen] = useSeen();
  const [isLog, setLog] = useState(log);
  const [robust, setRobust] = useState(false);
  const [smoothing, setSmoothing] = useState(smooth);
  const [large, setLarge] = useState(wide);
  const marks = useMarks();
  const { windows, error, busy } = useWindows(names, { off: !seen });
  const traces = names
    .filter((n) => windows.has(n))
    .map((n, i): Trace => ({ name: n, label: labels[n] ?? n, unit: run.series.get(n)?.unit ?? "", color: line(i), window: windows.get(n)! }));
  const first = run.series.get(names[0]);
  const about = names.length === 1 ? said(first?.description) : "";
  const unit = first?.unit ?? "";
  const left = robust ? hidden(traces) : 0;
  const range = run.view.start === undefined && run.view.stop === undefined ? undefined : ([run.view.start ?? 0, run.view.stop ?? run.extent[1]] as [number, number]);
  return (
    <section class={large ? "card panel wide" : "card panel"} ref={host as never} aria-label={title ?? names.join(", ")}>
      <header>
        <h3 title={about || names.join("\n")}>
          {title ?? names[0]}
          {unit && <span class="unit">{unit}</span>}
        </h3>
        <div class="tools">
          <Toggle on={smoothing > 0} label={t("Smoothed line")} icon="eye" onClick={() => setSmoothing(smoothing ? 0 : smooth || 0.004)} />
          <Toggle on={isLog} label={t("Logarithmic scale")} icon="log" onClick={() => setLog(!isLog)} />
          <Toggle on={robust} label={t("Robust scale: leave outliers out of the picture")} icon="fit" onClick={() => setRobust(!robust)} />
          <Toggle on={large} label={t("Full width")} icon="out" onClick={() => setLarge(!large)} />
          {onRemove && (
            <button type="button" class="icon-button" onClick={onRemove} aria-label={t("Remove the panel")} title={t("Remove the panel")}>
              <Icon name="close" size={14} />
            </button>
          )}
        </div>
      </header>
      {traces.length ? (
        <Chart
          title={title ?? names[0]}
          traces={traces}
          marks={marks}
          log={isLog}
          robust={robust}
          smooth={smoothing}
          height={large ? Math.round(height * 1.25) : height}
          range={range}
          bounds={bounds}
          sync={run.id}
          onZoom={run.zoom}
          onReset={() => run.zoom()}
        />
      ) : (
        <div class="empty" style={{ height: `${height + 22}px` }}>{error ? error.message : busy ? <span class="loading" /> : t("Nothing logged in this window.")}</div>
      )}
      {robust && <p class="note">{left ? t("{n} points lie outside this scale; triangles at the border show where.", { n: left }) : t("No point lies outside this scale.")}</p>}
    </section>
  );
}

function Toggle({ on, label, icon, onClick }: { on: boolean; label: string; icon: string; onClick: () => void }) {
  return (
    <button type="button" class="icon-button" aria-pressed={on} aria-label={label} title={label} onClick={onClick}>
      <Icon name={icon} size={14} />
    </button>
  );
}
