// Activation histograms, a row a layer: where the values lie, and how many sit at the edge of the number format.

import { useMemo, useState } from "preact/hooks";
import { runPath } from "./api";
import { figures, short } from "./format";
import { useGet, useRun } from "./run";
import { t, word } from "./text";

interface Histogram {
  low: number;
  high: number;
  counts: number[];
  below: number; // values under and over the bins: told, not drawn
  above: number;
  nonfinite: number;
  min: number | null;
  max: number | null;
  rms: number;
  kurtosis: number | null;
}
interface Answer {
  layers: { index: number; activations: Record<string, Histogram>; weights: Record<string, Histogram> }[];
}

export function Histograms({ step }: { step: number }) {
  const run = useRun();
  const { value, error } = useGet<Answer>(runPath(run.id, `/inspect/histograms?step=${step}`));
  const kinds = useMemo(() => {
    const out = new Map<string, "activations" | "weights">();
    for (const l of value?.layers ?? []) for (const of of ["activations", "weights"] as const) for (const k of Object.keys(l[of] ?? {})) out.set(k, of);
    return out;
  }, [value]);
  const [kind, setKind] = useState("residual");
  const shown = kinds.has(kind) ? kind : [...kinds.keys()][0];
  if (error || (value && !kinds.size)) return null;
  return (
    <section class="card histograms" aria-label={t("Activations and weights")}>
      <header>
        <h2>{t("Activations and weights")}<span class="unit">{t("share of values, logarithmic height")}</span></h2>
        {kinds.size > 0 && (
          <select aria-label={t("What is counted")} value={shown} onChange={(e) => setKind((e.target as HTMLSelectElement).value)}>
            {[...kinds].map(([k, of]) => <option key={k} value={k}>{word(of)}: {word(k)}</option>)}
          </select>
        )}
      </header>
      {!value && <span class="loading" />}
      <div class="hist-grid">
        {value?.layers.map((l) => {
          const h = (l[kinds.get(shown)!] ?? {})[shown];
          return h?.counts?.length ? <One key={l.index} h={h} name={`${t("layer")} ${l.index}`} /> : null;
        })}
      </div>
    </section>
  );
}

function One({ h, name }: { h: Histogram; name: string }) {
  const most = Math.log1p(Math.max(...h.counts, 1));
  const [w, height] = [200, 54];
  const bar = w / h.counts.length;
  const path = h.counts.map((c, i) => `M${(i * bar).toFixed(2)} ${height}V${(height - (Math.log1p(c) / most) * (height - 4)).toFixed(1)}h${(bar * 0.92).toFixed(2)}V${height}Z`).join("");
  const outside = h.below + h.above;
  return (
    <figure>
      <figcaption>
        {name} <small>rms {figures(h.rms, 3)}{h.kurtosis !== null && <> · {t("kurtosis")} {figures(h.kurtosis, 3)}</>}</small>
        {h.nonfinite > 0 && <small class="bad"> · {t("{n} non-finite values", { n: short(h.nonfinite) })}</small>}
      </figcaption>
      <svg viewBox={`0 0 ${w} ${height}`} preserveAspectRatio="none" role="img" aria-label={`${name}: ${figures(h.min, 3)} … ${figures(h.max, 3)}`}><path d={path} /></svg>
      <small class="ends"><span>{figures(h.low, 2)}</span>{outside > 0 && <span>{t("{n} outside, {a} … {b}", { n: short(outside), a: figures(h.min, 2), b: figures(h.max, 2) })}</span>}<span>{figures(h.high, 2)}</span></small>
    </figure>
  );
}
