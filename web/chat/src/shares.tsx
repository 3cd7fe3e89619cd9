// Hybrid layers: how much of each token's attention came from the global branch, token by token.

import { useMemo } from "preact/hooks";
import { percent } from "../../src/format";
import { Heat } from "../../src/heat";
import { t } from "../../src/text";
import { type Detail, visible } from "./detail";

export function Shares({ all, layers, layer, at }: { all: readonly Detail[]; layers: number[]; layer: number; at: number }) {
  const values = useMemo(() => layers.map((l) => all.map((d) => d.gates?.get(l) ?? null)), [all, layers]);
  const row = values[layers.indexOf(layer)] ?? [];
  const known = row.filter((v) => v !== null);
  const most = Math.max(0.1, ...values.map((of) => Math.max(...of.map((v) => v ?? 0)))); // small shares still differ
  const mean = known.reduce((a, b) => a + b, 0) / (known.length || 1);
  return (
    <div class="shares">
      <h4>{t("Share of the global branch, token by token")}</h4>
      <p class="note">{t("Layer {n}: {low} to {high}, {mean} on average", { n: layer, low: percent(Math.min(...known)), high: percent(Math.max(...known)), mean: percent(mean) })}</p>
      <Heat title={t("Share of the global branch")} rows={layers.map((l) => t("Layer {n}", { n: l }))} columns={all.map((_, i) => i + 1)} values={values} domain={[0, most]} cell={18} unit={(v) => percent(v)}
        picked={at >= 0 && layers.includes(layer) ? [layers.indexOf(layer), at] : null}
        say={(r, c, v) => t("“{token}” in layer {l}: {x} global", { token: visible(all[c]?.text ?? ""), l: layers[r], x: percent(v) })} columnLabel={t("A column is a token of the answer.")} />
    </div>
  );
}
