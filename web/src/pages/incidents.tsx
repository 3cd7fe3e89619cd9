// The list of incidents, worst and newest first; and one incident: what happened, who moved first, what to do.

import { useEffect, useMemo, useState } from "preact/hooks";
import { ActionButton, Commands } from "../actions";
import { type Evidence, type Incident, runPath, type Sample, send } from "../api";
import { Chart } from "../chart";
import { useCell } from "../cell";
import { atStep, ago, figures, grouped, measured, percent } from "../format";
import { Heat } from "../heat";
import { Icon, severityIcon } from "../icons";
import { useKeys } from "../keys";
import { Notes } from "../notes";
import { line } from "../palette";
import type { Mark, Trace } from "../plot";
import { go, link } from "../route";
import { useGet, useRun, useWindows } from "../run";
import { layerName, t, titleOf, word } from "../text";

export function Incidents() {
  const run = useRun();
  const order = (x: Incident) => (x.status === "open" ? 0 : x.status === "acknowledged" ? 1 : 2);
  const list = [...run.incidents].sort((a, b) => order(a) - order(b) || b.step - a.step);
  return (
    <section class="incidents" aria-label={t("Incidents")}>
      {!list.length && (
        <div class="card calm-card"><Icon name="check" size={28} /><p>{t("No incident. The detectors watch the loss, every gradient, the speed of every rank, the experts, the memory and the data.")}</p></div>
      )}
      <ul class="incident-list">
        {list.map((x) => (
          <li key={x.id} class={`card incident-row ${x.severity} ${x.status}`}>
            <a href={link(["run", run.id, "incidents", x.id])}>
              <span class={`sev ${x.severity}`}><Icon name={severityIcon(x.severity)} /> <span class="sr">{t(x.severity)}</span></span>
              <span class="incident-title"><b>{titleOf(x.title)}</b><small>{x.summary}</small></span>
              <Verdict incident={x} />
              <span class="incident-step">{atStep(x.step)}<small>{x.time ? ago(x.time) : word(x.status)}</small></span>
            </a>
          </li>
        ))}
      </ul>
      <Commands />
    </section>
  );
}

const VERDICTS: Record<string, string> = {
  DATA: "the data did it",
  MODEL: "the model did it",
  OPTIMISER: "the optimiser did it",
  PRECISION: "the number format did it",
  HARDWARE: "the hardware did it",
  UNKNOWN: "cause not found",
};

function Verdict({ incident, large }: { incident: Incident; large?: boolean }) {
  return (
    <span class={large ? `verdict large ${incident.verdict}` : `verdict ${incident.verdict}`}>
      <b>{word(incident.verdict)}</b>
      {large && <em>{t(VERDICTS[incident.verdict] ?? "")}</em>}
      <span class="confidence" role="img" aria-label={t("confidence {x}", { x: percent(incident.confidence) })}>
        <i style={{ width: `${Math.round(incident.confidence * 100)}%` }} />
      </span>
      <small>{percent(incident.confidence)}</small>
    </span>
  );
}

export function IncidentPage({ id }: { id: string }) {
  const run = useRun();
  const again = useCell(run.live.actions);
  const { value: incident, error } = useGet<Incident>(runPath(run.id, `/incidents/${encodeURIComponent(id)}`), again);
  const [chosen, setChosen] = useState<Sample[]>([]);
  useEffect(() => {
    const worst = [...(incident?.samples ?? [])].filter(located).sort(byLoss)[0];
    setChosen(worst ? [worst] : []);
  }, [incident?.id, incident?.samples.length]);
  const ordered = [...run.incidents].sort((a, b) => a.step - b.step);
  const at = ordered.findIndex((x) => String(x.id) === id);
  const jump = (by: number) => ordered[at + by] && go(link(["run", run.id, "incidents", ordered[at + by].id]));
  useKeys({ ArrowLeft: () => jump(-1), ArrowRight: () => jump(1), Escape: () => go(link(["run", run.id])) });
  if (error) return <p class="failed" role="alert">{error.message}</p>;
  if (!incident) return <div class="empty tall"><span class="loading" /></div>;
  return (
    <article class="incident" aria-label={titleOf(incident.title)}>
      <header class={`card incident-head ${incident.severity}`}>
        <div class="incident-what">
          <span class={`sev ${incident.severity}`}><Icon name={severityIcon(incident.severity)} /> {t(incident.severity)} · {atStep(incident.step)}{incident.time ? ` · ${ago(incident.time)}` : ""} · {word(incident.status)}</span>
          <h2>{titleOf(incident.title)}</h2>
          <p>{incident.summary}</p>
        </div>
        <Verdict incident={incident} large />
      </header>
      <div class="incident-columns">
        <div class="incident-main">
          <Movers incident={incident} />
          <GradientMap incident={incident} />
          <Samples incident={incident} chosen={chosen} onChoose={setChosen} />
        </div>
        <aside class="incident-side">
          <Act incident={incident} chosen={chosen} />
          <EvidenceList evidence={incident.evidence} />
          <Siblings incident={incident} />
          <Notes step={incident.step} />
        </aside>
      </div>
    </article>
  );
}

/** What helps against which kind of trouble, the most telling first. */
function actionNames(incident: Incident): string[] {
  if (["slow", "stall", "hang", "slow_rank", "memory"].includes(incident.kind)) return ["capture", "checkpoint", "pause"];
  if (["dead_expert", "plateau"].includes(incident.kind)) return ["checkpoint", "pause", "capture"];
  if (incident.kind === "data_drift") return ["quarantine", "pause", "checkpoint"];
  return ["rollback_skip", "quarantine", "replay", "pause"];
}

const NEAR = 10;

/** The step of the first bad batch: where the loss or a gradient moved, shortly before the alarm. */
function firstBad(incident: Incident): number {
  const moved = (incident.movers ?? []).filter((m) => /loss|grad_norm/.test(m.name) && m.step <= incident.step && incident.step - m.step <= NEAR);
  return Math.max(1, Math.min(incident.step, ...moved.map((m) => m.step)));
}

/** The arguments an action needs, from what the incident knows: the steps that moved, the documents that were chosen. */
function argumentsOf(name: string, incident: Incident, chosen: Sample[]): Record<string, unknown> {
  if (name === "rollback_skip") return { skip: [firstBad(incident), Math.max(1, incident.step)] };
  if (name === "replay") return { step: Math.max(1, incident.step) };
  if (name === "capture") return { steps: 3 };
  if (name === "quarantine")
    return { documents: chosen.map(({ source, path, offset }) => ({ source, path, offset })), reason: incident.title };
  return {};
}

/** What a run that has ended cannot do; to the rest it answers with the command to type, or does it at once. */
const ONLY_LIVE = new Set(["pause", "continue", "stop", "checkpoint", "capture"]);

function Act({ incident, chosen }: { incident: Incident; chosen: Sample[] }) {
  const run = useRun();
  const ended = run.info ? run.info.status !== "running" : false;
  const names = actionNames(incident).filter((n) => (n === "quarantine" ? incident.samples?.some(located) : !(ended && ONLY_LIVE.has(n))));
  const mark = async (status: string) => {
    await send("PATCH", runPath(run.id, `/incidents/${encodeURIComponent(incident.id)}`), { status });
    run.live.incidents.value++;
    run.live.actions.value++;
  };
  return (
    <section class="card act" aria-label={t("What to do")}>
      <h3>{t("What to do")}</h3>
      <div class="act-buttons">
        {names.map((name) => (
          <ActionButton key={name} name={name} incident={incident} values={argumentsOf(name, incident, chosen)} detail={detail(name, incident, chosen)} />
        ))}
      </div>
      <Commands only={(c) => String(c.arguments?.incident ?? c.incident ?? "") === String(incident.id)} />
      <div class="act-marks">
        {incident.status === "open" && <button type="button" class="link" onClick={() => mark("acknowledged")}>{t("I have seen it")}</button>}
        {incident.status !== "resolved" && <button type="button" class="link" onClick={() => mark("resolved")}>{t("It is resolved")}</button>}
        {incident.status === "resolved" && <button type="button" class="link" onClick={() => mark("open")}>{t("Open it again")}</button>}
      </div>
    </section>
  );
}

function detail(name: string, incident: Incident, chosen: Sample[]): string {
  if (name === "replay") return t("The batch of step {step}.", { step: grouped(incident.step) });
  if (name === "quarantine") return chosen.length ? chosen.map(place).join("\n") : t("Choose documents in the list of samples first.");
  return "";
}

function EvidenceList({ evidence }: { evidence: Evidence[] }) {
  return (
    <section class="card evidence" aria-label={t("Evidence")}>
      <h3>{t("Evidence")}</h3>
      {!evidence.length && <p class="note">{t("No evidence was kept.")}</p>}
      <ol>
        {evidence.map((e, i) => (
          <li key={i}>
            <p>{e.text}</p>
            <small>{[e.series, e.step !== undefined && e.step !== null ? `${atStep(e.step)}` : "", e.score !== undefined && e.score !== null ? `${figures(e.score, 3)} σ` : ""].filter(Boolean).join(" · ")}</small>
          </li>
        ))}
      </ol>
    </section>
  );
}

function Siblings({ incident }: { incident: Incident }) {
  const list = incident.siblings ?? [];
  if (!list.length) return null;
  return (
    <section class="card" aria-label={t("The same step in sibling runs")}>
      <h3>{t("The same step in sibling runs")}</h3>
      <ul class="siblings">
        {list.map((s) => <li key={s.run}><a href={link(["run", s.run])}>{s.run}</a><span>{s.text ?? figures(s.loss)}</span></li>)}
      </ul>
    </section>
  );
}

/** Small multiples, earliest mover first, all on the same steps: the order of the columns is the order of events. */
function Movers({ incident }: { incident: Incident }) {
  const run = useRun();
  const [all, setAll] = useState(false);
  const [a, wide] = incident.window?.length === 2 ? incident.window : [incident.step - 200, incident.step + 200];
  const end = run.info?.status === "running" ? run.info.total_steps : run.extent[1]; // no empty paper after the last step
  const b = end ? Math.min(wide, Math.max(end, incident.step + 10)) : wide;
  const movers = (incident.movers ?? []).slice(0, all ? 48 : 9);
  const names = useMemo(() => ["train/loss", ...movers.map((m) => m.name)].filter((n, i, x) => x.indexOf(n) === i), [incident.id, movers.length]);
  const { windows } = useWindows(names, { start: Math.max(0, a), stop: b + 1, points: 500 });
  const marks = useMemo((): Mark[] => [{ step: incident.first_step, kind: "focus" }, { step: incident.step, kind: incident.severity }], [incident]);
  const trace = (name: string, i: number): Trace[] => {
    const window = windows.get(name);
    return window ? [{ name, label: name, unit: run.series.get(name)?.unit ?? "", color: line(i), window }] : [];
  };
  const plain = { log: false, robust: false, smooth: 0, marks, range: [Math.max(0, a), b] as [number, number], sync: `incident-${incident.id}`, small: true };
  return (
    <section class="movers" aria-label={t("Who moved first")}>
      {windows.has("train/loss") && (
        <div class="card panel wide">
          <header><h3>{t("Loss around the incident")}<span class="unit">{t("steps {a} – {b}", { a: grouped(a), b: grouped(b) })}</span></h3></header>
          <Chart title={t("Loss around the incident")} traces={trace("train/loss", 0)} height={190} {...plain} />
        </div>
      )}
      <h3 class="section">{t("Who moved first")}</h3>
      {!movers.length && <p class="note">{t("No series moved before the incident.")}</p>}
      <div class="multiples">
        {movers.map((m, i) => (
          <figure key={m.name} class="card multiple">
            <figcaption>
              <span class="order">{i + 1}</span>
              <b title={m.name}>{m.name}</b>
              <small>{lead(m.step - incident.step)}</small>
            </figcaption>
            {windows.has(m.name) ? <Chart title={m.name} traces={trace(m.name, i === 0 ? 1 : 0)} height={92} legend={false} {...plain} /> : <div class="empty" style={{ height: "92px" }} />}
            <p class="before-after">{measured(m.before, run.series.get(m.name)?.unit)} → <b>{measured(m.after, run.series.get(m.name)?.unit)}</b>{m.score !== null && <small>{figures(m.score, 3)} σ</small>}</p>
          </figure>
        ))}
      </div>
      {incident.movers.length > 9 && <button type="button" class="link" onClick={() => setAll(!all)}>{all ? t("Fewer") : t("All {n} series that moved", { n: incident.movers.length })}</button>}
    </section>
  );
}

function lead(by: number): string {
  if (by === 0) return t("at the same step");
  return by < 0 ? t("{n} steps before", { n: -by }) : t("{n} steps after", { n: by });
}

function GradientMap({ incident }: { incident: Incident }) {
  const map = incident.gradient_map;
  const values = useMemo(() => (map?.values ? map.values.map((row) => row.map((v) => (v !== null && v > 0 ? Math.log10(v) : null))) : []), [map]);
  if (!map?.values?.length || !map.values[0].length) return null;
  const byLayer = map.values.length === map.layers.length;
  const rows = byLayer ? values : map.layers.map((_, l) => values.map((row) => row[l]));
  const raw = (r: number, c: number) => (byLayer ? map.values[r][c] : map.values[c][r]);
  return (
    <section class="card panel wide" aria-label={t("Gradient norm, layer by step")}>
      <header><h3>{t("Gradient norm, layer by step")}</h3></header>
      <Heat
        title={t("Gradient norm, layer by step")}
        rows={map.layers.map(layerName)}
        columns={map.steps}
        values={rows}
        unit={(v) => figures(10 ** v, 2)}
        say={(r, c) => `${layerName(map.layers[r])} · ${atStep(map.steps[c])}: ${figures(raw(r, c))}`}
        mark={[{ column: incident.step, severity: incident.severity }]}
        columnLabel={t("Brighter is larger, on a logarithmic scale.")}
      />
    </section>
  );
}

const located = (s: Sample) => Boolean(s.source && s.path);
const byLoss = (a: Sample, b: Sample) => (b.loss ?? -Infinity) - (a.loss ?? -Infinity);

function Samples({ incident, chosen, onChoose }: { incident: Incident; chosen: Sample[]; onChoose: (s: Sample[]) => void }) {
  const [open, setOpen] = useState<number | null>(null);
  const list = useMemo(() => [...(incident.samples ?? [])].sort(byLoss), [incident]);
  if (!list.length) return null;
  const most = Math.max(...list.map((s) => s.loss ?? 0), 1e-9);
  return (
    <section class="card samples" aria-label={t("Samples of the batch")}>
      <h3>{t("Samples of the batch")}<span class="unit">{t("highest loss first")}</span></h3>
      <ul>
        {list.map((s, i) => (
          <li key={i}>
            <input
              type="checkbox"
              aria-label={t("Choose {x} for quarantine", { x: place(s) })}
              title={t("Choose {x} for quarantine", { x: place(s) })}
              disabled={!located(s)}
              checked={chosen.includes(s)}
              onChange={() => onChoose(chosen.includes(s) ? chosen.filter((x) => x !== s) : [...chosen, s])}
            />
            <button type="button" class="sample" aria-expanded={open === i} onClick={() => setOpen(open === i ? null : i)}>
              <span class="sample-loss"><b>{figures(s.loss, 3)}</b><i style={{ width: `${((s.loss ?? 0) / most) * 100}%` }} /></span>
              <span class="sample-where">{place(s)}<small>{[s.source, s.length ? t("{n} tokens", { n: grouped(s.length) }) : "", `${t("row")} ${s.row}`].filter(Boolean).join(" · ")}</small></span>
              <span class="sample-text">{(s.text ?? "").slice(0, 160)}</span>
            </button>
            {open === i && <pre tabIndex={0}>{s.text || t("The text is not kept.")}</pre>}
          </li>
        ))}
      </ul>
    </section>
  );
}

const place = (s: Sample) => (s.path ? `${s.path.split("/").slice(-2).join("/")}:${s.offset ?? s.start ?? 0}` : t("position unknown"));
