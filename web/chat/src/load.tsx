// How an answer's tokens were shared among the experts: a bar an expert for one layer, a map of all layers.

import { useMemo } from "preact/hooks";
import { figures, percent } from "../../src/format";
import { Heat } from "../../src/heat";
import { t } from "../../src/text";
import { type Detail, loadOf } from "./detail";
import { expertClass, expertStyle } from "./hues";

interface Props {
  all: readonly Detail[];
  layer: number;
  layers: number[];
  picked: number | null;
  onPick: (expert: number) => void;
  onLayer: (layer: number) => void;
}

export function Load({ all, layer, layers, picked, onPick, onLayer }: Props) {
  const loads = useMemo(() => new Map(layers.map((l) => [l, loadOf(all, l)])), [all, layers]);
  const load = loads.get(layer);
  if (!load?.tokens) return null;
  const experts = Math.max(...[...loads.values()].map((l) => l.uses.length));
  const most = Math.max(...load.uses, 1);
  const each = load.uses.reduce((a, b) => a + b, 0) / load.tokens; // experts a token
  const silent = experts - load.uses.filter(Boolean).length;
  const share = (e: number) => (load.uses[e] ?? 0) / load.tokens;
  const values = layers.map((l) => Array.from({ length: experts }, (_, e) => (loads.get(l)!.uses[e] ?? 0) / (loads.get(l)!.tokens || 1)));
  return (
    <div class="loads">
      <figure class="load" aria-label={t("Load of the experts in layer {n}", { n: layer })}>
        <figcaption><h4>{t("Load of the experts in layer {n}", { n: layer })}</h4><small>{t("share of the answer's tokens; {k} experts a token", { k: figures(each, 2) })}{silent > 0 ? ` · ${t("{n} seen nowhere", { n: silent })}` : ""}</small></figcaption>
        <div class="load-bars" style={{ "--n": experts }}>
          {Array.from({ length: experts }, (_, e) => (
            <button key={e} type="button" class={`load-bar ${expertClass(e)}`} style={expertStyle(e)} aria-pressed={picked === e} onClick={() => onPick(e)}
              aria-label={t("Expert {e}: {x} of the tokens, mean gate {g}", { e, x: percent(share(e)), g: load.uses[e] ? figures(load.gates[e] / load.uses[e], 2) : "–" })} title={`${e}: ${percent(share(e))}`}>
              <span class="load-room"><i style={{ height: `${((load.uses[e] ?? 0) / most) * 100}%` }} /></span>
              {(experts <= 32 || e % 8 === 0) && <small>{e}</small>}
            </button>
          ))}
        </div>
      </figure>
      {layers.length > 1 && (
        <div class="load-map">
          <h4>{t("All layers")}</h4>
          <Heat title={t("Load of the experts by layer")} rows={layers.map((l) => t("Layer {n}", { n: l }))} columns={Array.from({ length: experts }, (_, e) => e)} values={values} cell={14}
            unit={(v) => percent(v)} grid onPick={(r) => onLayer(layers[r])}
            say={(r, e, v) => t("Layer {l}, expert {e}: {x} of the tokens", { l: layers[r], e, x: percent(v) })} columnLabel={t("Press a row to colour the tokens by that layer.")} />
        </div>
      )}
    </div>
  );
}
