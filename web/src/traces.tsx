// Captured traces: the bottleneck's verdict beside a link that opens the flame chart, served from this package.

import { useCell } from "./cell";
import { runPath } from "./api";
import { ago, bytes, grouped } from "./format";
import { Icon } from "./icons";
import { useGet, useRun } from "./run";
import { t } from "./text";

interface Trace {
  id: string | number;
  step?: number;
  steps?: number;
  time?: number;
  bytes?: number;
  verdict?: string | { bottleneck?: string; text?: string; advice?: string; [key: string]: unknown };
  [key: string]: unknown;
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
            <b>{spoken(x.verdict)}</b>
            <small>{[x.step !== undefined ? `${t("step")} ${grouped(x.step)}` : "", x.bytes ? bytes(x.bytes) : "", x.time ? ago(x.time) : ""].filter(Boolean).join(" · ")}</small>
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

function spoken(verdict: Trace["verdict"]): string {
  if (!verdict) return "";
  if (typeof verdict === "string") return verdict;
  return [verdict.bottleneck, verdict.text, verdict.advice].filter(Boolean).join(": ");
}
