// Several runs on one chart, one series at a time, with what differs between their last values.

import { useEffect, useMemo, useState } from "preact/hooks";
import { get, type RunCard, runPath, type SeriesInfo, type Window } from "../api";
import { Chart } from "../chart";
import { figures, measured, percent, short } from "../format";
import { Icon } from "../icons";
import { line } from "../palette";
import { Picker } from "../picker";
import type { Trace } from "../plot";
import { link, useRoute } from "../route";
import { useGet } from "../run";
import { said, t } from "../text";
import { Status } from "./runs";

export function Compare() {
  const { query } = useRoute();
  const ids = query.getAll("run");
  const runs = useGet<RunCard[]>("api/runs");
  const catalogue = useGet<SeriesInfo[]>(ids.length ? runPath(ids[0], "/series") : null);
  const [names, setNames] = useState<string[]>((query.get("name") ?? "train/loss,train/grad_norm,train/tokens_per_second").split(","));
  const [picking, setPicking] = useState(false);
  const [view, setView] = useState<[number, number] | null>(null);
  const cards = ids.map((id) => runs.value?.find((r) => r.id === id)).filter((r): r is RunCard => Boolean(r));
  return (
    <main id="main" class="compare">
      <div class="page-head">
        <h1>{t("Compare {n} runs", { n: ids.length })}</h1>
        <button type="button" class="button" onClick={() => setPicking(true)}><Icon name="plus" /> {t("Series")}</button>
        {view && <button type="button" class="button" onClick={() => setView(null)}><Icon name="reset" /> {t("All steps")}</button>}
      </div>
      <div class="card table-card" tabIndex={0} role="group" aria-label={t("Runs")}>
        <table>
          <thead><tr><th>{t("Run")}</th><th>{t("Status")}</th><th class="n">{t("Step")}</th><th class="n">{t("Loss")}</th><th class="n">{t("against the best")}</th><th class="n">tok/s</th><th class="n">{t("Parameters")}</th></tr></thead>
          <tbody>
            {cards.map((r, i) => {
              const best = Math.min(...cards.map((c) => c.loss ?? Infinity));
              return (
                <tr key={r.id}>
                  <td><i class="key" style={{ background: line(i) }} aria-hidden="true" /> <a href={link(["run", r.id])}>{r.name}</a></td>
                  <td><Status status={r.status} /></td>
                  <td class="n">{short(r.step)}</td>
                  <td class="n">{figures(r.loss)}</td>
                  <td class="n">{r.loss === null ? "–" : r.loss === best ? t("best") : `+${percent(r.loss / best - 1)}`}</td>
                  <td class="n">{short(r.tokens_per_second)}</td>
                  <td class="n">{short(r.parameters)}</td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <div class="panels two">
        {names.map((name, i) => (
          <Together key={name} name={name} wide={i === 0} ids={ids} cards={cards} about={catalogue.value?.find((s) => s.name === name)} view={view} setView={setView} />
        ))}
      </div>
      {picking && (
        <Picker
          title={t("Series to compare")}
          series={catalogue.value ?? []}
          chosen={names}
          onClose={() => setPicking(false)}
          onDone={(x) => {
            setNames(x);
            keepInAddress(ids, x);
            setPicking(false);
          }}
        />
      )}
    </main>
  );
}

function keepInAddress(ids: string[], names: string[]): void {
  const parts = [...ids.map((r) => ["run", r]), ["name", names.join(",")]];
  history.replaceState(null, "", `#/compare?${new URLSearchParams(parts as [string, string][])}`);
}

function Together({ name, wide, ids, cards, about, view, setView }: {
  wide: boolean;
  name: string;
  ids: string[];
  cards: RunCard[];
  about?: SeriesInfo;
  view: [number, number] | null;
  setView: (v: [number, number] | null) => void;
}) {
  const [found, setFound] = useState<Record<string, Window | null> | null>(null);
  const [failed, setFailed] = useState<string | null>(null);
  const [log, setLog] = useState(name.endsWith("grad_norm"));
  useEffect(() => {
    let alive = true;
    const query = new URLSearchParams(ids.map((r) => ["run", r]));
    query.set("name", name);
    query.set("points", "1200");
    if (view) {
      query.set("start", String(view[0]));
      query.set("stop", String(view[1]));
    }
    get<Record<string, Window | null>>(`api/compare?${query}`).then((x) => alive && setFound(x), (e) => alive && setFailed(e.message));
    return () => void (alive = false);
  }, [name, ids.join("\n"), view?.[0], view?.[1]]);
  const traces = useMemo(
    () =>
      ids.flatMap((id, i): Trace[] => {
        const window = found?.[id];
        return window?.step?.length ? [{ name: id, label: cards.find((c) => c.id === id)?.name ?? id, unit: about?.unit ?? "", color: line(i), window }] : [];
      }),
    [found, cards.length, about],
  );
  return (
    <section class={wide ? "card panel wide" : "card panel"} aria-label={name}>
      <header>
        <h2 title={said(about?.description)}>{name}{about?.unit && <span class="unit">{about.unit}</span>}</h2>
        <div class="tools">
          <button type="button" class="icon-button" aria-pressed={log} aria-label={t("Logarithmic scale")} title={t("Logarithmic scale")} onClick={() => setLog(!log)}><Icon name="log" size={14} /></button>
        </div>
      </header>
      {traces.length ? (
        <Chart title={name} traces={traces} log={log} robust={false} smooth={0.004} height={260} sync="compare" range={view ?? undefined} onZoom={(a, b) => setView([Math.max(0, a), b])} onReset={() => setView(null)} />
      ) : (
        <div class="empty" style={{ height: "280px" }}>{failed ?? (found ? t("None of these runs logs it.") : <span class="loading" />)}</div>
      )}
      <p class="note">{measured(about?.last, about?.unit) !== "–" ? said(about?.description) : ""}</p>
    </section>
  );
}
