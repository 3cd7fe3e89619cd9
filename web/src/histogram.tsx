// Activation histograms, a row a layer: where the values lie, and how many sit at the edge of the number format.

import { useMemo } from "preact/hooks";
import { runPath } from "./api";
import { figures } from "./format";
import { useGet, useRun } from "./run";
import { t } from "./text";

interface Histogram {
  layer?: number | string;
  index?: number | string;
  name?: string;
  edges: number[];
  counts: number[];
  [key: string]: unknown;
}

export function Histograms({ step }: { step: number }) {
  const run = useRun();
  const { value, error } = useGet<{ layers?: Histogram[]; histograms?: Histogram[] } | Histogram[]>(runPath(run.id, `/inspect/histograms?step=${step}`));
  const list = useMemo(() => (Array.isArray(value) ? value : (value?.layers ?? value?.histograms ?? [])).filter((h) => h.counts?.length), [value]);
  if (error || (value && !list.length)) return null;
  return (
    <section class="card histograms" aria-label={t("Activations")}>
      <h2>{t("Activations")}<span class="unit">{t("share of values, logarithmic height")}</span></h2>
      {!value && <span class="loading" />}
      <div class="hist-grid">{list.map((h, i) => <One key={i} h={h} />)}</div>
    </section>
  );
}

function One({ h }: { h: Histogram }) {
  const total = h.counts.reduce((a, b) => a + b, 0) || 1;
  const most = Math.log1p(Math.max(...h.counts));
  const [w, height] = [200, 54];
  const bar = w / h.counts.length;
  const path = h.counts.map((c, i) => `M${(i * bar).toFixed(2)} ${height}V${(height - (Math.log1p(c) / most) * (height - 4)).toFixed(1)}h${(bar * 0.92).toFixed(2)}V${height}Z`).join("");
  const name = h.name ?? `${t("layer")} ${h.layer ?? h.index}`;
  const [low, high] = [h.edges[0], h.edges[h.edges.length - 1]];
  const others = Object.entries(h).filter(([k, v]) => typeof v === "number" && !["layer", "index"].includes(k)).slice(0, 3);
  return (
    <figure>
      <figcaption>{name} <small>{others.map(([k, v]) => `${t(k)} ${figures(v as number, 3)}`).join(" · ")}</small></figcaption>
      <svg viewBox={`0 0 ${w} ${height}`} preserveAspectRatio="none" role="img" aria-label={`${name}: ${figures(low, 3)} … ${figures(high, 3)}, n = ${total}`}><path d={path} /></svg>
      <small class="ends"><span>{figures(low, 2)}</span><span>{figures(high, 2)}</span></small>
    </figure>
  );
}
