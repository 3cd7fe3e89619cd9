// The inspector: every head of every layer, coloured by what it does; a head opened; what the model loses without it.

import { useMemo, useState } from "preact/hooks";
import { ActionButton, Commands } from "../actions";
import { Attention } from "../attention";
import { runPath, send } from "../api";
import { atStep, figures } from "../format";
import { Heat } from "../heat";
import { Icon } from "../icons";
import { Panel } from "../panel";
import { byName } from "../picker";
import { setQuery, useRoute } from "../route";
import { useGet, useRun } from "../run";
import { layerName, t, word } from "../text";
import { StepTime } from "./overview";
import { Histograms } from "../histogram";
import { Traces } from "../traces";

interface InspectInfo {
  steps: number[];
  layers: { index: number; kind: string; heads: number; experts?: number }[];
}
type Figures = Record<string, number | null>;
type Head = Figures & { z?: Record<string, number | null>; why?: string; kind?: string };
interface Suspect {
  layer: number;
  head?: number;
  expert?: number;
  score: number;
  why: string;
}
interface Heads {
  step?: number;
  layers: { index: number; heads: Head[] }[];
  suspects: Suspect[];
  experts?: { index: number; experts: Figures[] }[];
  suspects_experts?: Suspect[];
}

const MEASURES: Record<string, [string, string]> = {
  score: ["Suspicion", "How far a head stands out from the others of its layer, all measures together."],
  output_norm: ["Output norm", "Size of what the head adds to the residual stream."],
  entropy: ["Entropy", "How widely the head looks: low is one token, high is all of them."],
  sink: ["Sink", "Share of attention on the first token."],
  max_logit: ["Largest logit", "Largest query-key product: very large ones saturate the softmax."],
  gate: ["Gate γ", "Share of the pooled branch in a hybrid head."],
  removal: ["Use", "How much the loss would change without the head, by its gradient: near zero is idle."],
  similarity: ["Twin", "Largest likeness to another head of the layer: 1 is a copy."],
};

export function Inspect() {
  const run = useRun();
  const { query } = useRoute();
  const info = useGet<InspectInfo>(runPath(run.id, "/inspect"));
  const steps = info.value?.steps ?? [];
  const step = query.get("step") ? Number(query.get("step")) : steps[steps.length - 1];
  const heads = useGet<Heads>(info.value ? runPath(run.id, `/inspect/heads${step === undefined ? "" : `?step=${step}`}`) : null);
  const chosen = query.get("head")?.split(".").map(Number);
  const pick = (layer: number, head: number) => setQuery({ head: `${layer}.${head}` });
  if (info.error) return <><p class="failed" role="alert">{info.error.message}</p><LivePart /></>;
  if (!info.value) return <div class="empty tall"><span class="loading" /></div>;
  return (
    <section class="inspect">
      <div class="inspect-bar">
        <label>
          {t("Checkpoint")}{" "}
          <select value={step === undefined ? "" : String(step)} onChange={(e) => setQuery({ step: (e.target as HTMLSelectElement).value, head: query.get("head") ?? undefined })}>
            {!steps.length && <option value="">{t("none yet")}</option>}
            {[...steps].reverse().map((s) => <option key={s} value={String(s)}>{atStep(s)}</option>)}
          </select>
        </label>
        <span class="note">{t("Computed on this machine from the checkpoint; nothing leaves it.")}</span>
      </div>
      {heads.error && <p class="failed" role="alert">{heads.error.message}</p>}
      {!heads.value && !heads.error && <div class="card empty tall"><span class="loading" /><p>{t("Running the model on a held-out batch…")}</p></div>}
      {heads.value && <Grid heads={heads.value} chosen={chosen} onPick={pick} />}
      {chosen?.length === 2 && heads.value && <HeadCard layer={chosen[0]} head={chosen[1]} step={step} values={heads.value} />}
      {heads.value && <InspectExperts heads={heads.value} step={step} />}
      {step !== undefined && <Histograms step={step} />}
      <LivePart />
    </section>
  );
}

function Grid({ heads, chosen, onPick }: { heads: Heads; chosen?: number[]; onPick: (layer: number, head: number) => void }) {
  const known = Object.keys(MEASURES).filter((m) => heads.layers.some((l) => l.heads.some((h) => h[m] !== null && h[m] !== undefined)));
  const [measure, setMeasure] = useState(known.includes("output_norm") ? "output_norm" : known[0]);
  const [scored, setScored] = useState(true);
  const most = Math.max(...heads.layers.map((l) => l.heads.length), 1);
  const raw = (r: number, c: number) => heads.layers[r]?.heads[c]?.[measure] ?? null;
  const values = useMemo(() => heads.layers.map((l) => {
    const row = l.heads.map((h) => h[measure] ?? null);
    const told = l.heads.map((h) => h.z?.[measure]);
    if (scored && told.some((z) => z !== undefined)) return told.map((z) => z ?? null);
    return scored && measure !== "score" ? standard(row) : row;
  }), [heads, measure, scored]);
  const signed = scored && measure !== "score";
  const row = chosen ? heads.layers.findIndex((l) => l.index === chosen[0]) : -1;
  return (
    <div class="inspect-grid">
      <section class="card panel" aria-label={t("Heads")}>
        <header>
          <h2>{t("Heads")}<span class="unit">{t("layer × head")}</span></h2>
          <div class="segments" role="group" aria-label={t("Measure")}>
            {known.map((m) => <button key={m} type="button" aria-pressed={m === measure} onClick={() => setMeasure(m)} title={t(MEASURES[m][1])}>{t(MEASURES[m][0])}</button>)}
          </div>
        </header>
        <Heat
          title={t("Heads")}
          rows={heads.layers.map((l) => `${t("layer")} ${l.index}`)}
          columns={Array.from({ length: most }, (_, h) => h)}
          values={values}
          scale={signed ? "signed" : "amount"}
          domain={signed ? [-3, 3] : undefined}
          unit={signed ? (v) => `${figures(v, 2)} σ` : (v) => figures(v, 3)}
          cell={26}
          grid
          onPick={(r, c) => c < heads.layers[r].heads.length && onPick(heads.layers[r].index, c)}
          picked={row >= 0 ? [row, chosen![1]] : null}
          say={(r, c) => (c < (heads.layers[r]?.heads.length ?? 0) ? `${t("layer")} ${heads.layers[r].index} · ${t("head")} ${c} · ${known.map((m) => `${t(MEASURES[m][0])} ${figures(heads.layers[r].heads[c][m], 3)}`).join(" · ")}` : "")}
          columnLabel={t(MEASURES[measure]?.[1] ?? "")}
        />
        <label class="check"><input type="checkbox" checked={scored} onChange={() => setScored(!scored)} /> {t("Compare within each layer (z-score)")}</label>
        <span class="sr">{chosen && row >= 0 ? figures(raw(row, chosen[1])) : ""}</span>
      </section>
      <Suspects title="Suspects" list={heads.suspects} onPick={(s) => s.head !== undefined && onPick(s.layer, s.head)} />
    </div>
  );
}

function Suspects({ title, list, onPick }: { title: string; list: Suspect[]; onPick?: (s: Suspect) => void }) {
  return (
    <section class="card suspects" aria-label={t(title)}>
      <h2>{t(title)}</h2>
      {!list.length && <p class="note">{t("Nothing stands out.")}</p>}
      <ol>
        {list.slice(0, 8).map((s, i) => (
          <li key={i}>
            <button type="button" class="suspect" onClick={() => onPick?.(s)}>
              <b>{t("layer")} {s.layer} · {s.expert !== undefined ? `${t("expert")} ${s.expert}` : `${t("head")} ${s.head}`}</b>
              <span class="score">{figures(s.score, 3)}</span>
              <small>{s.why}</small>
            </button>
          </li>
        ))}
      </ol>
    </section>
  );
}

/** (x − median) / (1.4826 × MAD) within one layer: an outlier does not hide behind the spread it makes itself. */
function standard(row: (number | null)[]): (number | null)[] {
  const known = row.filter((v): v is number => v !== null);
  const middle = (xs: number[]) => [...xs].sort((a, b) => a - b)[xs.length >> 1] ?? 0;
  const m = middle(known);
  const wide = 1.4826 * middle(known.map((v) => Math.abs(v - m))) || 1e-9;
  return row.map((v) => (v === null ? null : (v - m) / wide));
}

function HeadCard({ layer, head, step, values }: { layer: number; head: number; step?: number; values: Heads }) {
  const run = useRun();
  const found = values.layers.find((l) => l.index === layer)?.heads[head];
  const history = [...run.series.values()].filter((s) => s.name.startsWith(`attention/${layer}/${head}/`)).sort(byName);
  return (
    <section class="card head-card" aria-label={t("Layer {layer}, head {head}", { layer, head })}>
      <header>
        <h2>{t("Layer {layer}, head {head}", { layer, head })}</h2>
        <button type="button" class="icon-button" aria-label={t("Close")} onClick={() => setQuery({ head: undefined })}><Icon name="close" /></button>
      </header>
      <div class="head-body">
        <Attention layer={layer} head={head} step={step} />
        <div class="head-side">
      <dl class="numbers">
        {Object.keys(MEASURES).filter((m) => found?.[m] !== null && found?.[m] !== undefined).map((m) => <div key={m}><dt>{t(MEASURES[m][0])}</dt><dd>{figures(found![m], 3)}</dd></div>)}
      </dl>
      {found?.why && (found.score ?? 0) >= 1 && <p class="note">{found.why}</p>}
      <Ablate what={{ layer, head, step }} />
      {history.length > 0 && <div class="panels">{history.map((s) => <Panel key={s.name} names={[s.name]} title={s.name.split("/").pop()} height={120} />)}</div>}
        </div>
      </div>
    </section>
  );
}

interface Ablated {
  loss: number;
  ablated_loss: number;
  delta: number;
}

function Ablate({ what }: { what: { layer: number; head?: number; expert?: number; step?: number } }) {
  const run = useRun();
  const [state, setState] = useState<{ busy?: boolean; found?: Ablated; error?: string; key?: string }>({});
  const key = JSON.stringify(what);
  const current = state.key === key ? state : {};
  const press = async () => {
    setState({ busy: true, key });
    try {
      setState({ found: await send<Ablated>("POST", runPath(run.id, "/inspect/ablate"), what), key });
    } catch (error) {
      setState({ error: (error as Error).message, key });
    }
  };
  const found = current.found;
  return (
    <div class="ablate">
      <button type="button" class="button" onClick={press} disabled={current.busy} title={t("Sets its output to zero and computes the loss of a held-out batch again. The run is not touched.")}>
        {current.busy ? <span class="loading small" /> : <Icon name="minus" />} {t("Ablate → Δ loss")}
      </button>
      <span aria-live="polite">
        {found && (
          <>
            {figures(found.loss)} → {figures(found.ablated_loss)} · <b class={found.delta > 0 ? "worse" : "better"}>{found.delta >= 0 ? "+" : ""}{figures(found.delta, 3)}</b>{" "}
            <small>{t(found.delta > 0 ? "the model needs it" : "the model is better without it")}</small>
          </>
        )}
        {current.error && <span class="failed">{current.error}</span>}
      </span>
    </div>
  );
}

function InspectExperts({ heads, step }: { heads: Heads; step?: number }) {
  const [chosen, setChosen] = useState<[number, number] | null>(null);
  const layers = heads.experts ?? [];
  const key = ["load", "share", "tokens"].find((k) => layers.some((l) => l.experts?.some((e) => k in e)));
  const values = useMemo(() => layers.map((l) => (l.experts ?? []).map((e) => (key ? (e[key] ?? null) : null))), [heads]);
  if (!layers.length || !key) return null;
  return (
    <div class="inspect-grid">
      <section class="card panel" aria-label={t("Experts")}>
        <header><h2>{t("Experts")}<span class="unit">{t("layer × expert")} · {word(key)}</span></h2></header>
        <Heat
          title={t("Experts")}
          rows={layers.map((l) => `${t("layer")} ${l.index}`)}
          columns={Array.from({ length: Math.max(...values.map((v) => v.length)) }, (_, e) => e)}
          values={values}
          cell={22}
          grid
          onPick={(r, c) => setChosen([layers[r].index, c])}
          say={(r, c) => `${t("layer")} ${layers[r].index} · ${t("expert")} ${c} · ${Object.entries(layers[r].experts[c] ?? {}).filter(([k]) => k !== "twin").map(([k, v]) => `${word(k)} ${figures(v, 3)}`).join(" · ")}`}
          columnLabel={t("Click an expert to ablate it.")}
        />
        {chosen && <div class="chosen"><b>{t("layer")} {chosen[0]} · {t("expert")} {chosen[1]}</b> <Ablate what={{ layer: chosen[0], expert: chosen[1], step }} /></div>}
      </section>
      <Suspects title="Suspect experts" list={heads.suspects_experts ?? []} onPick={(s) => s.expert !== undefined && setChosen([s.layer, s.expert])} />
    </div>
  );
}

/** What the run itself logs, without a checkpoint: update sizes, times, traces. */
function LivePart() {
  const run = useRun();
  const ratios = [...run.series.keys()].filter((n) => /^layer\/.+\/update_ratio$/.test(n)).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const rms = [...run.series.keys()].filter((n) => /^layer\/.+\/activation_rms$/.test(n)).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const label = (names: string[]) => Object.fromEntries(names.map((n) => [n, layerName(n.split("/")[1])]));
  return (
    <>
      <StepTime />
      <section class="card traces" aria-label={t("Traces")}>
        <header><h2>{t("Traces")}</h2><ActionButton name="capture" values={{ steps: 3 }} /></header>
        <Traces />
        <Commands only={(c) => c.action === "capture"} />
      </section>
      <div class="panels two">
        {ratios.length > 0 && <Panel names={ratios.slice(0, 8)} labels={label(ratios)} title={t("Update / weight per layer")} log smooth={0.006} />}
        {rms.length > 0 && <Panel names={rms.slice(0, 8)} labels={label(rms)} title={t("Activation RMS per layer")} log smooth={0.006} />}
      </div>
    </>
  );
}
