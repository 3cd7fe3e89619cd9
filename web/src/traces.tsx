// Captured traces: the bottleneck's verdict beside a link that opens the flame chart, served from this package.

import { useCell } from "./cell";
import { runPath } from "./api";
import { atStep, ago, duration, percent } from "./format";
import { Icon } from "./icons";
import { useGet, useRun } from "./run";
import { t, word } from "./text";

interface Trace {
  id: string;
  step?: number;
  steps?: number;
  time?: number;
  verdict: string; // 'data-bound', 'host-bound', …
  reason: string;
  advice: string;
  seconds: number;
  shares: Record<string, number>;
  top: { name: string; seconds: number; share: number }[];
}

export function Traces() {
  const run = useRun();
  const news = useCell(run.live.actions);
  const { value, error } = useGet<Trace[]>(runPath(run.id, "/traces"), news);
  if (error) return <p class="note">{error.message}</p>;
  if (!value?.length) return <p class="note">{t("No trace yet. A capture records kernels, data waits and communication of three steps.")}</p>;
  return (
    <ul class="trace-list">
      {value.map((x) => (
        <li key={x.id}>
          <a class="button" href={viewer(run.id, x)} target="_blank" rel="noopener"><Icon name="out" /> {t("Open the flame chart")}</a>
          <span>
            <b>{word(x.verdict)}</b>
            <span>{x.reason} {x.advice}</span>
            <small>{[x.step !== undefined ? `${atStep(x.step)}` : "", `${duration(x.seconds)} ${t("a step")}`, x.time ? ago(x.time) : ""].filter(Boolean).join(" · ")}</small>
            <small>{Object.entries(x.shares ?? {}).filter(([, v]) => v > 0.005).sort((a, b) => b[1] - a[1]).map(([k, v]) => `${word(k)} ${percent(v)}`).join(" · ")}</small>
            {x.top?.length > 0 && <small>{x.top.slice(0, 4).map((o) => `${o.name} ${percent(o.share)}`).join(" · ")}</small>}
          </span>
        </li>
      ))}
    </ul>
  );
}

function viewer(run: string, trace: Trace): string {
  const profile = new URL(runPath(run, `/traces/${encodeURIComponent(String(trace.id))}`), document.baseURI);
  return `speedscope/index.html#profileURL=${encodeURIComponent(profile.pathname)}&title=${encodeURIComponent(`${run} · ${trace.step ?? trace.id}`)}`;
}
