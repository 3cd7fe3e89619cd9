// The router's view of an answer: every token as a chip, coloured by what one layer did with it, or by how likely it was.
//
// Colour is never alone: an expert also has a number on each of its chips and, beyond the eighth, a pattern; a probability
// has a line under the token that gets denser the less likely it was.

import { Component } from "preact";
import { useMemo, useState } from "preact/hooks";
import { useCell } from "../../src/cell";
import { figures, percent } from "../../src/format";
import { Icon } from "../../src/icons";
import { css, dark, shade } from "../../src/palette";
import { t, useLang } from "../../src/text";
import { type Detail, layersOf, sureness, visible } from "./detail";
import { expertClass, expertStyle } from "./hues";
import { Load } from "./load";
import { Shares } from "./shares";

export type View = "experts" | "gates" | "sureness";
const VIEWS: [View, string][] = [["experts", "Experts"], ["gates", "Global branch"], ["sureness", "Probability"]];
const CHUNK = 100; // chips that are drawn again together
const SHOWN = 2000; // chips before the reader asks for all

export function Tokens({ all }: { all: readonly Detail[] }) {
  const [wish, setView] = useState<View>("experts");
  const [layers, setLayers] = useState<Partial<Record<View, number>>>({});
  const [at, setAt] = useState(-1); // under the pointer or the focus
  const [stop, setStop] = useState(0); // where Tab enters the chips
  const [picked, setPicked] = useState<number | null>(null); // an expert whose tokens stand out
  const [whole, setWhole] = useState(false);
  const expertLayers = useMemo(() => layersOf(all, "experts"), [all]);
  const gateLayers = useMemo(() => layersOf(all, "gates"), [all]);
  const can: Record<View, boolean> = { experts: expertLayers.length > 0, gates: gateLayers.length > 0, sureness: all.some((d) => d.logprob !== undefined) };
  const view = can[wish] ? wish : (VIEWS.find(([v]) => can[v])?.[0] ?? "sureness");
  const ofView = view === "experts" ? expertLayers : view === "gates" ? gateLayers : [];
  const layer = ofView.includes(layers[view] ?? -1) ? layers[view]! : (ofView[Math.floor(ofView.length / 2)] ?? -1);
  const setLayer = (next: number) => {
    setLayers({ ...layers, [view]: next });
    setPicked(null);
  };
  const step = (by: number) => {
    const next = ofView[ofView.indexOf(layer) + by];
    if (next !== undefined) setLayer(next);
  };
  const count = whole ? all.length : Math.min(all.length, SHOWN);
  const key = (e: KeyboardEvent & { currentTarget: HTMLElement }) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[e.key];
    if (e.key === "[" || e.key === "]") step(e.key === "[" ? -1 : 1);
    else if (move !== undefined) {
      const next = Math.min(Math.max(stop + move, 0), count - 1);
      setStop(next);
      e.currentTarget.querySelector<HTMLElement>(`[data-i="${next}"]`)?.focus();
    } else return;
    e.preventDefault();
    e.stopPropagation();
  };
  const indexOf = (e: Event) => Number((e.target as HTMLElement).closest<HTMLElement>("[data-i]")?.dataset.i ?? -1);
  const lang = useLang();
  const isDark = useCell(dark);
  const look = { view, layer, picked, lang, isDark };
  const chunks = [];
  for (let from = 0; from < count; from += CHUNK) {
    const to = Math.min(from + CHUNK, count);
    chunks.push(<Chunk key={from} from={from} items={all.slice(from, to)} look={look} stop={stop >= from && stop < to ? stop : -1} />);
  }
  return (
    <section class={`tokens by-${view}`} aria-label={t("Tokens of the answer")}>
      <header>
        <div class="segments" role="group" aria-label={t("Coloured by")}>
          {VIEWS.map(([v, label]) => <button key={v} type="button" aria-pressed={v === view} disabled={!can[v]} onClick={() => setView(v)}>{t(label)}</button>)}
        </div>
        {ofView.length > 0 && (
          <div class="layer">
            <button type="button" class="icon-button" onClick={() => step(-1)} disabled={layer === ofView[0]} aria-label={t("Layer before")} title="["><Icon name="left" size={13} /></button>
            <select aria-label={t("Layer")} value={layer} onChange={(e) => setLayer(Number(e.currentTarget.value))}>
              {ofView.map((l) => <option key={l} value={l}>{t("Layer {n}", { n: l })}</option>)}
            </select>
            <button type="button" class="icon-button" onClick={() => step(1)} disabled={layer === ofView[ofView.length - 1]} aria-label={t("Layer after")} title="]"><Icon name="right" size={13} /></button>
          </div>
        )}
        <Key view={view} />
      </header>
      <div class="chips" role="group" aria-label={t("Tokens; arrow keys move, [ and ] change the layer")} onKeyDown={key}
        onPointerOver={(e) => { const i = indexOf(e); if (i >= 0) setAt(i); }} onFocusIn={(e) => { const i = indexOf(e); if (i >= 0) { setAt(i); setStop(i); } }}>
        {chunks}
      </div>
      {count < all.length && <button type="button" class="button" onClick={() => setWhole(true)}>{t("Show all {n} tokens", { n: all.length })}</button>}
      <About all={all} at={at} view={view} layer={layer} />
      {view === "experts" && <Load all={all} layer={layer} layers={expertLayers} picked={picked} onPick={(e) => setPicked(e === picked ? null : e)} onLayer={setLayer} />}
      {view === "gates" && <Shares all={all} layers={gateLayers} layer={layer} at={at} />}
    </section>
  );
}

interface Look {
  view: View;
  layer: number;
  picked: number | null;
  lang: string;
  isDark: boolean;
}
interface ChunkProps {
  from: number;
  items: readonly Detail[];
  look: Look;
  stop: number;
}

class Chunk extends Component<ChunkProps> {
  shouldComponentUpdate({ items, look, stop }: ChunkProps): boolean {
    const now = this.props;
    const same = (Object.keys(look) as (keyof Look)[]).every((k) => look[k] === now.look[k]);
    return !same || stop !== now.stop || items.length !== now.items.length || items[items.length - 1] !== now.items[now.items.length - 1];
  }
  render({ from, items, look, stop }: ChunkProps) {
    return <span class="chunk">{items.map((d, k) => chip(d, from + k, look, from + k === stop))}</span>;
  }
}

function chip(d: Detail, i: number, { view, layer, picked }: Look, enters: boolean) {
  const used = view === "experts" ? d.experts?.get(layer) : undefined;
  const share = view === "gates" ? d.gates?.get(layer) : undefined;
  const level = view === "sureness" ? sureness(d.logprob) : null;
  const [top] = used ?? [];
  let [name, style, mark, words]: [string, Record<string, string>, string, string] = ["chip", {}, "", ""];
  if (top) [name, style, mark, words] = [`chip ${expertClass(top[0])}`, expertStyle(top[0]), String(top[0]), t("expert {n}", { n: top[0] })];
  else if (share !== undefined) [style, mark, words] = [{ "--c": css(shade("amount", share)), "--h": `${Math.round(share * 100)}%` }, String(Math.round(share * 100)), t("global share {x}", { x: percent(share) })];
  else if (level !== null) [name, words] = [`chip sure-${level}`, t("probability {x}", { x: percent(Math.exp(d.logprob!)) })];
  if (picked !== null && used) name += used.some(([e]) => e === picked) ? " has" : " hasnt";
  return [
    <button key={i} type="button" class={name} style={style} data-i={i} data-mark={mark || undefined} tabIndex={enters ? 0 : -1} aria-label={`${d.text.trim() ? d.text : visible(d.text)}${words ? `, ${words}` : ""}`}>
      <span>{visible(d.text)}</span>
    </button>,
    d.text.includes("\n") ? <br key={`${i}n`} /> : null,
  ];
}

function Key({ view }: { view: View }) {
  if (view === "experts") return <p class="note key-line">{t("Number and colour: the expert with the largest gate.")}</p>;
  if (view === "gates") return <p class="note key-line">{t("Number and bar: per cent of the global branch; the rest is the window's.")}</p>;
  return (
    <p class="note key-line sure-key">
      {["< 5 %", "< 20 %", "< 50 %", "< 90 %", "≥ 90 %"].map((label, i) => <span key={i} class={`chip sure-${i}`}>{label}</span>)}
    </p>
  );
}

/** One token in full. It keeps its height, so that nothing jumps while the pointer wanders. */
function About({ all, at, view, layer }: { all: readonly Detail[]; at: number; view: View; layer: number }) {
  const d = all[at];
  if (!d) return <div class="about card"><p class="note">{t("Point at a token, or walk with the arrow keys, to see its gates and its alternatives.")}</p></div>;
  const used = d.experts?.get(layer);
  return (
    <div class="about card">
      <p class="about-head"><b class="mono">{visible(d.text)}</b> <span class="note">{t("token {i} of {n}", { i: at + 1, n: all.length })}{d.id !== undefined && ` · id ${d.id}`}{d.logprob !== undefined && ` · ${percent(Math.exp(d.logprob), 3)}`}</span></p>
      <div class="about-columns">
        {view === "experts" && used && (
          <div>
            <h4>{t("Experts in layer {n}", { n: layer })}</h4>
            <ul class="gate-bars">{used.map(([e, g]) => <li key={e}><span class={`swatch ${expertClass(e)}`} style={expertStyle(e)} /><span class="number">{e}</span><Bar share={g} /><small>{figures(g, 2)}</small></li>)}</ul>
          </div>
        )}
        {view === "experts" && d.experts && (
          <div class="about-layers">
            <h4>{t("In every layer")}</h4>
            <ol>{[...d.experts].map(([l, pairs]) => <li key={l} class={l === layer ? "on" : undefined}><small>{l}</small> {pairs.map(([e]) => <span key={e} class={`dot ${expertClass(e)}`} style={expertStyle(e)}>{e}</span>)}</li>)}</ol>
          </div>
        )}
        {view === "gates" && d.gates && (
          <div>
            <h4>{t("Share of the global branch")}</h4>
            <ul class="gate-bars">{[...d.gates].map(([l, share]) => <li key={l} class={l === layer ? "on" : undefined}><small>{t("layer {n}", { n: l })}</small><Bar share={share} /><small>{percent(share)}</small></li>)}</ul>
          </div>
        )}
        {d.top && d.top.length > 0 && (
          <div>
            <h4>{t("Alternatives")}</h4>
            <ul class="gate-bars">{d.top.map(([text, logprob], i) => <li key={i} class={text === d.text ? "on" : undefined}><span class="mono alternative">{visible(text)}</span><Bar share={Math.exp(logprob)} /><small>{percent(Math.exp(logprob))}</small></li>)}</ul>
          </div>
        )}
      </div>
    </div>
  );
}

const Bar = ({ share }: { share: number }) => <span class="bar" aria-hidden="true"><i style={{ width: `${Math.min(Math.max(share, 0), 1) * 100}%` }} /></span>;

