// All runs under the root: a card each, searched, sorted, chosen for comparison; j and k walk, Enter opens.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { RunCard } from "../api";
import { ago, figures, grouped, short } from "../format";
import { Icon } from "../icons";
import { useKeys } from "../keys";
import { go, link } from "../route";
import { useGet } from "../run";
import { Spark } from "../spark";
import { t, word } from "../text";

const ORDERS = { updated: "Latest first", loss: "Lowest loss", incidents: "Most incidents", name: "Name" };

export function Runs() {
  const [tick, setTick] = useState(0);
  const { value, error } = useGet<RunCard[]>("api/runs", tick);
  const [text, setText] = useState("");
  const [order, setOrder] = useState<keyof typeof ORDERS>("updated");
  const [chosen, setChosen] = useState<string[]>([]);
  const [at, setAt] = useState(-1);
  const list = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const timer = setInterval(() => !document.hidden && setTick((n) => n + 1), 5000);
    return () => clearInterval(timer);
  }, []);
  const shown = useMemo(() => sorted((value ?? []).filter((r) => fits(r, text)), order), [value, text, order]);
  const flip = (id: string) => setChosen((c) => (c.includes(id) ? c.filter((x) => x !== id) : [...c, id]));
  const move = (by: number) => {
    const next = Math.min(Math.max(at + by, 0), shown.length - 1);
    setAt(next);
    list.current?.querySelectorAll<HTMLAnchorElement>("a.run-link")[next]?.focus();
  };
  const compare = () => chosen.length > 1 && go(`#/compare?${chosen.map((r) => `run=${encodeURIComponent(r)}`).join("&")}`);
  useKeys({ j: () => move(1), k: () => move(-1), x: () => shown[at] && flip(shown[at].id), c: compare });
  return (
    <main class="runs" id="main">
      <div class="page-head">
        <h1>{t("Runs")}</h1>
        <span class="count">{value ? value.length : ""}</span>
        <input id="search" type="search" placeholder={t("Search runs")} aria-label={t("Search runs")} value={text} onInput={(e) => setText((e.target as HTMLInputElement).value)} />
        <select aria-label={t("Order")} value={order} onChange={(e) => setOrder((e.target as HTMLSelectElement).value as keyof typeof ORDERS)}>
          {Object.entries(ORDERS).map(([key, label]) => <option key={key} value={key}>{t(label)}</option>)}
        </select>
        <button type="button" class="button primary" disabled={chosen.length < 2} onClick={compare}>
          {chosen.length > 1 ? t("Compare {n}", { n: chosen.length }) : t("Compare")}
        </button>
      </div>
      {error && <p class="failed" role="alert">{error.message}</p>}
      {value && !value.length && <p class="empty">{t("No run yet. Start one with `deepseek quickstart`; it appears here by itself.")}</p>}
      <div class="cards" ref={list}>
        {shown.map((r, i) => r.error !== undefined && !r.spark ? <Damaged key={r.id} run={r} /> : <Card key={r.id} run={r} chosen={chosen.includes(r.id)} onChoose={() => flip(r.id)} onFocus={() => setAt(i)} />)}
        {!value && !error && Array.from({ length: 6 }, (_, i) => <div key={i} class="card run-card ghost" />)}
      </div>
    </main>
  );
}

function Damaged({ run }: { run: RunCard }) {
  return (
    <article class="card run-card">
      <header><h2>{run.name}</h2><Status status={run.status} /></header>
      <p class="failed">{run.error || t("This run cannot be read")}</p>
    </article>
  );
}

function Card({ run, chosen, onChoose, onFocus }: { run: RunCard; chosen: boolean; onChoose: () => void; onFocus: () => void }) {
  const share = run.step && run.total_steps ? Math.min(run.step / run.total_steps, 1) : null;
  return (
    <article class={chosen ? "card run-card chosen" : "card run-card"}>
      <header>
        <a class="run-link" href={link(["run", run.id])} onFocus={onFocus}><h2>{run.name}</h2></a>
        <Status status={run.status} />
      </header>
      <Spark values={run.spark ?? []} label={t("Loss of {name}", { name: run.name })} />
      <dl>
        <div><dt>{t("Loss")}</dt><dd>{figures(run.loss)}</dd></div>
        <div><dt>{t("Step")}</dt><dd>{run.step === null || run.step === undefined ? "–" : short(run.step, 4)}{run.total_steps ? <small> / {short(run.total_steps)}</small> : null}</dd></div>
        <div><dt>tok/s</dt><dd>{short(run.tokens_per_second)}</dd></div>
      </dl>
      <div class="progress" role="img" aria-label={share === null ? t("no end known") : `${Math.round(share * 100)} %`}><i style={{ width: `${(share ?? 0) * 100}%` }} /></div>
      <footer>
        <label class="choose"><input type="checkbox" checked={chosen} onChange={onChoose} aria-label={t("Choose {name} to compare", { name: run.name })} /></label>
        <span class="facts">{[run.parameters ? t("{n} parameters", { n: short(run.parameters) }) : "", run.device ?? "", ago(run.updated)].filter(Boolean).join(" · ")}</span>
        {run.incidents_open > 0 && (
          <a class="badge critical" href={link(["run", run.id, "incidents"])}>
            <Icon name="alarm" size={12} /> {t(run.incidents_open === 1 ? "{n} incident" : "{n} incidents", { n: grouped(run.incidents_open) })}
          </a>
        )}
      </footer>
    </article>
  );
}

export function Status({ status }: { status: string }) {
  return <span class={`status ${status.replace(/\W.*/, "")}`}><i aria-hidden="true" />{word(status)}</span>;
}

function fits(run: RunCard, text: string): boolean {
  const all = `${run.name} ${run.id} ${run.status} ${run.device}`.toLowerCase();
  return text.toLowerCase().split(/\s+/).every((word) => all.includes(word));
}

function sorted(runs: RunCard[], order: keyof typeof ORDERS): RunCard[] {
  const by: Record<keyof typeof ORDERS, (a: RunCard, b: RunCard) => number> = {
    updated: (a, b) => (b.updated ?? 0) - (a.updated ?? 0),
    loss: (a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity),
    incidents: (a, b) => b.incidents_open - a.incidents_open,
    name: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
  };
  return [...runs].sort(by[order]);
}
