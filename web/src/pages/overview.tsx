// The run at a glance: health, the whole run in a strip, then learning, speed, memory, ranks, and the reader's own panels.

import { useMemo, useState } from "preact/hooks";
import { runPath } from "../api";
import { remember, remembered, useCell } from "../cell";
import { atStep, duration, figures, grouped } from "../format";
import { Health } from "../health";
import { Heat } from "../heat";
import { Icon } from "../icons";
import { Notes } from "../notes";
import { line } from "../palette";
import { Panel, useSeen } from "../panel";
import { Picker } from "../picker";
import { setQuery, useRoute } from "../route";
import { useGet, useRun } from "../run";
import { t } from "../text";
import { Timeline } from "../timeline";

interface Recipe {
  title: string;
  names: string[];
  labels?: Record<string, string>;
  log?: boolean;
  wide?: boolean;
  smooth?: number;
  height?: number;
}

const LEARNING: Recipe[] = [
  { title: "Loss", names: ["train/loss", "eval/loss"], labels: { "train/loss": "train", "eval/loss": "eval" }, wide: true, height: 250 },
  { title: "Gradient norm", names: ["train/grad_norm"], log: true },
  { title: "Learning rate", names: ["train/lr"], smooth: 0 },
  { title: "Bits per byte", names: ["train/bits_per_byte", "eval/bits_per_byte"], labels: { "train/bits_per_byte": "train", "eval/bits_per_byte": "eval" } },
];
const SPEED: Recipe[] = [
  { title: "Tokens per second", names: ["train/tokens_per_second"] },
  { title: "Share of peak FLOPs (MFU)", names: ["train/mfu"] },
  { title: "Time per step", names: ["time/forward", "time/backward", "time/optimizer", "time/communication", "time/data", "time/other"], smooth: 0.006 },
];
const MEMORY: Recipe[] = [
  { title: "Memory", names: ["memory/allocated", "memory/reserved", "memory/rss"], smooth: 0 },
  { title: "Memory by class", names: ["memory/weights", "memory/gradients", "memory/optimizer", "memory/activations"], smooth: 0 },
];
const ROUTING: Recipe[] = [
  { title: "Router entropy", names: ["train/router_entropy"] },
  { title: "Largest load violation", names: ["train/max_vio"] },
];

export function Overview() {
  const run = useRun();
  const known = run.series;
  const group = (title: string, recipes: Recipe[]) => {
    const shown = recipes.map((r) => ({ ...r, names: r.names.filter((n) => known.has(n)) })).filter((r) => r.names.length);
    return shown.length ? (
      <section class="group" aria-label={t(title)}>
        <h2>{t(title)}</h2>
        <div class="panels">
          {shown.map((r) => <Panel key={r.title} {...r} title={t(r.title)} labels={r.labels ?? tails(r.names)} />)}
        </div>
      </section>
    ) : null;
  };
  return (
    <>
      <Health />
      <Timeline series={known.has("train/loss") || !known.size ? "train/loss" : [...known.keys()][0]} />
      <Own />
      {!run.listed && <div class="panels">{[0, 1, 2, 3].map((i) => <div key={i} class={i ? "card panel ghost" : "card panel wide ghost"}><span class="loading" /></div>)}</div>}
      {group("Learning", LEARNING)}
      {group("Speed", SPEED)}
      <StepTime />
      {group("Memory", MEMORY)}
      {group("Routing", ROUTING)}
      {[...known.keys()].some((n) => n.startsWith("rank/")) && <Ranks />}
      {run.listed && <Notes />}
      <Facts />
    </>
  );
}

const tails = (names: string[]) => Object.fromEntries(names.map((n) => [n, n.split("/").slice(1).join("/")]));

/** Where the time of a step goes, from the newest values: a bar whose parts are measured, not assumed. */
export function StepTime() {
  const run = useRun();
  const last = useCell(run.live.last);
  const parts = ["forward", "backward", "optimizer", "communication", "data", "other"]
    .map((key) => ({ key, seconds: last.get(`time/${key}`) ?? run.series.get(`time/${key}`)?.last ?? 0 }))
    .filter((p) => p.seconds > 0);
  const total = parts.reduce((sum, p) => sum + p.seconds, 0);
  if (!total) return null;
  return (
    <section class="card step-time" aria-label={t("Where a step's time goes")}>
      <header><h3>{t("Where a step's time goes")}<span class="unit">{duration(total)}</span></h3></header>
      <div class="stack" aria-hidden="true">
        {parts.map((p, i) => <i key={p.key} style={{ width: `${(p.seconds / total) * 100}%`, background: line(i) }} />)}
      </div>
      <ul class="stack-key">
        {parts.map((p, i) => (
          <li key={p.key}><i class="key" style={{ background: line(i) }} aria-hidden="true" />{t(p.key)} <b>{Math.round((p.seconds / total) * 100)} %</b> <small>{duration(p.seconds)}</small></li>
        ))}
      </ul>
    </section>
  );
}

interface RankMap {
  ranks: number[];
  steps: number[];
  seconds: (number | null)[][];
}

function Ranks() {
  const run = useRun();
  const [host, seen] = useSeen();
  const beat = useCell(run.live.beat);
  const range = run.view.start === undefined && run.view.stop === undefined ? "" : `&start=${run.view.start ?? 0}&stop=${run.view.stop ?? run.extent[1]}`;
  const { value } = useGet<RankMap>(seen ? runPath(run.id, `/ranks?points=360${range}`) : null, beat);
  const rows = useMemo(() => (value?.ranks.length ? byRank(value) : []), [value]);
  return (
    <section class="card panel wide" ref={host as never} aria-label={t("Ranks over time")}>
      <header><h3>{t("Ranks over time")}<span class="unit">{t("seconds per step")}</span></h3></header>
      {rows.length ? (
        <Heat
          title={t("Ranks over time")}
          rows={value!.ranks.map((r) => `${t("rank")} ${r}`)}
          columns={value!.steps}
          values={rows}
          unit={duration}
          domain={robustDomain(rows)}
          say={(r, c, v) => `${t("rank")} ${value!.ranks[r]} · ${atStep(value!.steps[c])}: ${duration(v)}`}
          columnLabel={t("The bright stripe is the rank the others wait for.")}
        />
      ) : <div class="empty">{value ? t("Nothing logged in this window.") : <span class="loading" />}</div>}
    </section>
  );
}

/** Rows by rank, whichever way round the answer lies. */
function byRank({ ranks, steps, seconds }: RankMap): (number | null)[][] {
  if (seconds.length === ranks.length && (seconds[0]?.length ?? 0) === steps.length) return seconds;
  return ranks.map((_, r) => seconds.map((row) => row[r] ?? null));
}

/** From the smallest value to the largest, but at least 1.5 × the median wide, so that even ranks look even. */
function robustDomain(rows: (number | null)[][]): [number, number] {
  const all = rows.flat().filter((v): v is number => v !== null).sort((a, b) => a - b);
  if (!all.length) return [0, 1];
  return [all[0], Math.max(all[all.length - 1], 1.5 * all[all.length >> 1])];
}

/** Panels the reader put together: in the address, so they can be sent, and in the browser, so they stay. */
function Own() {
  const run = useRun();
  const { query } = useRoute();
  const [picking, setPicking] = useState(false);
  const text = query.get("panels") ?? remembered("panels", "");
  const panels = text.split(";").filter(Boolean).map((p) => p.split(","));
  const save = (next: string[][]) => {
    const joined = next.map((p) => p.join(",")).join(";");
    remember("panels", joined);
    setQuery({ panels: joined || undefined });
  };
  return (
    <section class="group" aria-label={t("My panels")}>
      <div class="group-head">
        {panels.length > 0 && <h2>{t("My panels")}</h2>}
        <button type="button" class="search-button" id="search" onClick={() => setPicking(true)}>
          <Icon name="search" /> {t("Show any of {n} series", { n: run.series.size || "…" })} <kbd>/</kbd>
        </button>
      </div>
      {panels.length > 0 && (
        <div class="panels">
          {panels.map((names, i) => (
            <Panel key={names.join()} names={names} title={names.length > 2 ? shared(names) : names.join(" · ")} onRemove={() => save(panels.filter((_, k) => k !== i))} />
          ))}
        </div>
      )}
      {picking && (
        <Picker
          title={t("Add a panel")}
          series={[...run.series.values()]}
          chosen={[]}
          onClose={() => setPicking(false)}
          onDone={(names) => {
            save([names, ...panels]);
            setPicking(false);
          }}
        />
      )}
    </section>
  );
}

/** "layer/3/grad_norm", "layer/4/grad_norm" → "layer/*​/grad_norm". */
export function shared(names: string[]): string {
  const parts = names.map((n) => n.split("/"));
  if (parts.some((p) => p.length !== parts[0].length)) return `${names[0]} +${names.length - 1}`;
  return parts[0].map((p, i) => (parts.every((x) => x[i] === p) ? p : "*")).join("/");
}

const fact = (v: unknown) => (typeof v === "number" ? (Number.isInteger(v) ? grouped(v) : figures(v, 5)) : String(v));

function Facts() {
  const run = useRun();
  const facts = Object.entries(run.info?.facts ?? {}).filter(([, v]) => v !== null && typeof v !== "object");
  if (!run.info) return null;
  return (
    <section class="group facts-group" aria-label={t("Facts and configuration")}>
      <h2>{t("Facts and configuration")}</h2>
      <details class="card facts">
        <summary>{facts.slice(0, 5).map(([k, v]) => `${k} ${fact(v)}`).join(" · ") || t("Configuration")}</summary>
        <dl>{facts.map(([k, v]) => <div key={k}><dt>{k}</dt><dd>{fact(v)}</dd></div>)}</dl>
        {run.info.config && <pre tabIndex={0}>{run.info.config}</pre>}
      </details>
      <p class="note">
        {t("All series as a file:")} <a href={runPath(run.id, "/export?format=csv")}>CSV</a> · <a href={runPath(run.id, "/export?format=parquet")}>Parquet</a>
      </p>
    </section>
  );
}
