// Experts: the load of each in each layer now, how one layer came there, and which are dead.

import { useMemo, useState } from "preact/hooks";
import { runPath } from "../api";
import { useCell } from "../cell";
import { atStep, figures, grouped } from "../format";
import { Heat } from "../heat";
import { Panel } from "../panel";
import { useGet, useRun } from "../run";
import { t } from "../text";
import { Timeline } from "../timeline";

interface Layer {
  index: number;
  load: (number | null)[];
  bias?: (number | null)[];
  entropy: number | null;
  max_vio: number | null;
  dead: number | null;
  coverage?: number | null;
  history?: { steps: number[]; load: (number | null)[][] };
}

export function Experts() {
  const run = useRun();
  const beat = useCell(run.live.beat);
  const { value, error } = useGet<{ layers: Layer[] }>(runPath(run.id, "/experts?points=300"), beat);
  const [chosen, setChosen] = useState<number | null>(null);
  const layers = value?.layers ?? [];
  const now = useMemo(() => layers.map((l) => relative(l.load)), [value]);
  if (error) return <p class="failed" role="alert">{error.message}</p>;
  if (!value) return <div class="empty tall"><span class="loading" /></div>;
  if (!layers.length) return <p class="empty">{t("This run logs no expert.")}</p>;
  const layer = layers.find((l) => l.index === chosen) ?? worst(layers);
  return (
    <section class="experts">
      <Timeline series={run.series.has("train/max_vio") ? "train/max_vio" : "train/loss"} />
      <section class="card panel wide" aria-label={t("Load of every expert now")}>
        <header><h2>{t("Load of every expert now")}<span class="unit">{t("times the mean")}</span></h2></header>
        <Heat
          title={t("Load of every expert now")}
          rows={layers.map((l) => `${t("layer")} ${l.index}`)}
          columns={Array.from({ length: Math.max(...layers.map((l) => l.load.length)) }, (_, e) => e)}
          values={now}
          scale="signed"
          domain={[0, 2]}
          unit={(v) => `${figures(v, 2)}×`}
          cell={20}
          onPick={(r) => setChosen(layers[r].index)}
          say={(r, e, v) => `${t("layer")} ${layers[r].index} · ${t("expert")} ${e}: ${figures(v, 3)} ${t("times the mean")}${v === 0 ? ` · ${t("dead")}` : ""}`}
          columnLabel={t("Blue gets less than its share, vermilion more. Click a layer for its history.")}
        />
      </section>
      <div class="experts-two">
        <div class="card table-card" tabIndex={0} role="group" aria-label={t("Layers")}>
          <table>
            <thead><tr><th>{t("Layer")}</th><th class="n">{t("Entropy")}</th><th class="n">{t("Max violation")}</th><th class="n">{t("Dead")}</th><th class="n">{t("Coverage")}</th></tr></thead>
            <tbody>
              {layers.map((l) => (
                <tr key={l.index} class={l === layer ? "on" : ""}>
                  <td><button type="button" class="link" onClick={() => setChosen(l.index)}>{t("layer")} {l.index}</button></td>
                  <td class="n">{figures(l.entropy, 3)}</td>
                  <td class="n">{figures(l.max_vio, 3)}</td>
                  <td class={l.dead ? "n bad" : "n"}>{grouped(l.dead)}</td>
                  <td class="n">{figures(l.coverage, 3)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
        {layer.history && layer.history.load.length > 0 && (
          <section class="card panel" aria-label={t("Load over time, layer {n}", { n: layer.index })}>
            <header><h2>{t("Load over time, layer {n}", { n: layer.index })}</h2></header>
            <History layer={layer} />
          </section>
        )}
      </div>
      <div class="panels">
        {[["train/router_entropy", "Router entropy"], ["train/max_vio", "Largest load violation"], ["train/balance_loss", "Balance loss"], ["train/coverage", "Coverage"]]
          .filter(([n]) => run.series.has(n))
          .map(([n, title]) => <Panel key={n} names={[n]} title={t(title)} height={170} />)}
      </div>
    </section>
  );
}

function History({ layer }: { layer: Layer }) {
  const { steps, load } = layer.history!;
  const rows = useMemo(() => {
    const means = steps.map((_, s) => mean(load.map((row) => row[s])));
    return load.map((row) => row.map((v, s) => (v === null || !means[s] ? null : v / means[s])));
  }, [layer]);
  return (
    <Heat
      title={t("Load over time, layer {n}", { n: layer.index })}
      rows={load.map((_, e) => `${e}`)}
      columns={steps}
      values={rows}
      scale="signed"
      domain={[0, 2]}
      unit={(v) => `${figures(v, 2)}×`}
      cell={Math.max(4, Math.min(16, Math.floor(300 / load.length)))}
      say={(e, s, v) => `${t("expert")} ${e} · ${atStep(steps[s])}: ${figures(v, 3)} ${t("times the mean")}`}
      columnLabel={t("One row an expert")}
    />
  );
}

const mean = (values: (number | null)[]) => {
  const known = values.filter((v): v is number => v !== null);
  return known.reduce((a, b) => a + b, 0) / (known.length || 1);
};
const relative = (load: (number | null)[]) => {
  const m = mean(load);
  return load.map((v) => (v === null || !m ? null : v / m));
};
const worst = (layers: Layer[]) => layers.reduce((a, b) => ((b.max_vio ?? 0) + 10 * (b.dead ?? 0) > (a.max_vio ?? 0) + 10 * (a.dead ?? 0) ? b : a));
