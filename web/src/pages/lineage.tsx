// Where the weights come from: attempts as rails over the step axis, joined where one went on from another's checkpoint.

import type { LineageItem } from "../api";
import { atStep, bytes, clock, grouped } from "../format";
import { Icon } from "../icons";
import { checkpoints, useRun } from "../run";
import { t, word } from "../text";
import { said } from "./precision";

interface Rail {
  from: number;
  to: number;
  why: string;
}
const ICONS: Record<string, string> = { checkpoint: "save", resume: "play", rollback: "rewind", rollback_skip: "rewind", skip: "right", quarantine: "shield", config: "log", interrupted: "stop", done: "check", start: "flag", run: "flag" };
const kind = (x: LineageItem) => String(x.kind ?? x.event ?? "");

export function Lineage() {
  const run = useRun();
  const all = run.lineage.some((x) => kind(x) === "checkpoint") ? run.lineage : [...run.lineage, ... checkpoints(run).map((c): LineageItem => ({ ...c, kind: "checkpoint" }))];
  const items = all.filter((x) => !withRollback(x, all));
  const list = [...items].sort((a, b) => (b.time ?? 0) - (a.time ?? 0) || (b.step ?? 0) - (a.step ?? 0));
  return (
    <section class="lineage">
      <section class="card panel wide" aria-label={t("Attempts")}>
        <header><h2>{t("Attempts")}<span class="unit">{t("over the step axis")}</span></h2></header>
        <Rails items={items} last={run.extent[1]} />
      </section>
      <ol class="card events">
        {folded(list).map((x, i) => Array.isArray(x) ? <Fold key={i} items={x} /> : (
          <li key={i} class={kind(x)}>
            <span class="event-icon"><Icon name={ICONS[kind(x)] ?? "flag"} size={14} /></span>
            <b>{word(kind(x))}</b>
            <span class="event-step">{x.step !== null && x.step !== undefined ? `${atStep(x.step)}` : ""}</span>
            <span class="event-said">{said({ ...x, bytes: typeof x.bytes === "number" ? bytes(x.bytes) : undefined })}</span>
            <small>{clock(x.time)}</small>
          </li>
        ))}
        {!list.length && <li class="note">{t("Nothing yet: the first checkpoint starts the line.")}</li>}
      </ol>
    </section>
  );
}

/** A rollback resumes from its checkpoint: the resume at the same moment is the same attempt. */
function withRollback(x: LineageItem, all: LineageItem[]): boolean {
  return kind(x) === "resume" && all.some((y) => kind(y) === "rollback" && y.step === x.step && Math.abs((y.time ?? 0) - (x.time ?? 0)) < 5);
}

/** Four or more checkpoints in a row become one line that opens. */
function folded(list: LineageItem[]): (LineageItem | LineageItem[])[] {
  const out: (LineageItem | LineageItem[])[] = [];
  for (let i = 0; i < list.length; ) {
    let k = i;
    while (k < list.length && kind(list[k]) === "checkpoint") k++;
    if (k - i >= 4) out.push(list.slice(i, k));
    else out.push(...list.slice(i, Math.max(k, i + 1)));
    i = Math.max(k, i + 1);
  }
  return out;
}

function Fold({ items }: { items: LineageItem[] }) {
  const steps = items.map((x) => x.step ?? 0);
  return (
    <li class="checkpoint">
      <span class="event-icon"><Icon name="save" size={14} /></span>
      <details>
        <summary>
          <b>{t("{n} checkpoints", { n: items.length })}</b>
          {t("steps {a} – {b}", { a: grouped(Math.min(...steps)), b: grouped(Math.max(...steps)) })}
        </summary>
        <ul>{items.map((x, i) => <li key={i}>{atStep(x.step)} · {clock(x.time)}{typeof x.bytes === "number" ? ` · ${bytes(x.bytes)}` : ""}</li>)}</ul>
      </details>
    </li>
  );
}

/** Each resume or rollback begins a rail at the step it went back to; the one before ends where it was left. */
export function rails(items: LineageItem[], last: number): Rail[] {
  const out: Rail[] = [{ from: 0, to: last, why: "start" }];
  let reached = 0;
  for (const x of [...items].sort((a, b) => (a.time ?? 0) - (b.time ?? 0))) {
    const step = x.step ?? null;
    if (step === null) continue;
    if (["resume", "rollback", "rollback_skip"].includes(kind(x))) {
      const back = Number(x.to ?? step); // a rollback is told at the step it went back to, with where it came `from_step`
      const rail = out[out.length - 1];
      rail.to = Math.max(reached, Number(x.from_step ?? 0), step, back);
      out.push({ from: Number.isFinite(back) ? back : step, to: last, why: kind(x) });
      reached = back;
    } else reached = Math.max(reached, step);
  }
  return out;
}

function Rails({ items, last }: { items: LineageItem[]; last: number }) {
  const all = rails(items, last);
  const [w, gap, top] = [1000, 34, 22];
  const x = (step: number) => 12 + (step / Math.max(last, 1)) * (w - 24);
  const y = (i: number) => top + i * gap;
  const marks = items.filter((i) => kind(i) === "checkpoint" && typeof i.step === "number");
  return (
    <svg class="rails" viewBox={`0 0 ${w} ${top + all.length * gap}`} role="img" aria-label={t("{n} attempts up to step {step}", { n: all.length, step: grouped(last) })}>
      {all.map((rail, i) => (
        <g key={i}>
          {i > 0 && <path class="rail-join" d={`M${x(rail.from)} ${y(i - 1)}C${x(rail.from)} ${y(i) - 6} ${x(rail.from)} ${y(i)} ${x(rail.from) + 14} ${y(i)}`} />}
          <path class={i === all.length - 1 ? "rail on" : "rail"} d={`M${x(rail.from) + (i ? 14 : 0)} ${y(i)}H${Math.max(x(rail.to), x(rail.from) + 15)}`} />
          <text x={Math.min(x(rail.from) + 16, w - 180)} y={y(i) - 7}>{word(rail.why)} · {grouped(rail.from)} – {grouped(rail.to)}</text>
        </g>
      ))}
      {marks.slice(-300).map((c, k) => {
        const i = railOf(all, c, items);
        return <path key={k} class="rail-mark" d={`M${x(c.step as number)} ${y(i) - 5}l5 5l-5 5l-5 -5z`}><title>{`${t("checkpoint")} ${grouped(c.step as number)}`}</title></path>;
      })}
    </svg>
  );
}

/** The attempt that wrote a checkpoint: as many resumes and rollbacks came before it in time. */
function railOf(all: Rail[], c: LineageItem, items: LineageItem[]): number {
  const before = items.filter((x) => ["resume", "rollback", "rollback_skip"].includes(kind(x)) && typeof x.step === "number" && (x.time ?? 0) <= (c.time ?? 0));
  return Math.min(before.length, all.length - 1);
}
