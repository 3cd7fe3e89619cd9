// One head's attention map on a canvas. The server sends a square of the picture at the resolution shown, so 4K
// tokens cost what 512 do; the wheel and the buttons zoom, dragging moves, and at close range the tokens are named.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { runPath, search } from "./api";
import { useCell } from "./cell";
import { figures, grouped, percent } from "./format";
import { Legend } from "./heat";
import { Icon } from "./icons";
import { dark, table } from "./palette";
import { useGet, useRun } from "./run";
import { t, word } from "./text";

const PIXELS = 512;
const CLOSEST = 24; // tokens a side at the deepest zoom
const NAMED = 48; // up to so many tokens a side are named

interface Tile {
  start: number;
  size: number; // tokens shown, on both axes
  length: number; // tokens of the whole row
  tokens: { id: number; text: string }[]; // of the window
  values: string; // bytes in base64, row by row: weight = scale · (byte / 255)^gamma
  scale: number;
  gamma: number;
  branch?: string;
  branches?: string[];
}

export function Attention({ layer, head, step }: { layer: number; head: number; step?: number }) {
  const run = useRun();
  const [view, setView] = useState<{ start: number; size: number } | null>(null);
  const [gamma, setGamma] = useState(0.4);
  const [branch, setBranch] = useState("");
  const [at, setAt] = useState<[number, number] | null>(null);
  useEffect(() => setView(null), [layer, head, step]);
  const { value, error, busy } = useGet<Tile>(runPath(run.id, `/inspect/attention${search({ layer, head, step, start: view?.start, size: view?.size, pixels: PIXELS, branch })}`));
  const kept = useRef<Tile | null>(null);
  if (value) kept.current = value;
  const tile = value ?? kept.current;
  const length = tile?.length ?? 0;
  const start = view?.start ?? 0;
  const size = view?.size ?? length;
  const zoom = (factor: number, centre = start + size / 2) => {
    const next = Math.round(Math.min(Math.max(size * factor, CLOSEST), length));
    const share = (centre - start) / Math.max(size, 1);
    const from = Math.round(Math.min(Math.max(centre - share * next, 0), length - next));
    setView(next >= length ? null : { start: from, size: next });
  };
  const move = (by: number) => view && setView({ ...view, start: Math.round(Math.min(Math.max(view.start + by, 0), length - view.size)) });
  const matrix = useMemo(() => (tile ? unpack(tile) : null), [tile]);
  if (error) return <p class="failed" role="alert">{error.message}</p>;
  if (!tile || !matrix) return <div class="empty tall"><span class="loading" /></div>;
  const token = (i: number) => tile.tokens[i - tile.start]?.text ?? "";
  const weight = at ? matrix.at(at[0], at[1]) : null;
  const [q, k] = at ? [start + Math.floor(at[0] * size), start + Math.floor(at[1] * size)] : [0, 0];
  const keys = (e: KeyboardEvent) => {
    const acts: Record<string, () => void> = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": () => setView(null), ArrowLeft: () => move(-size / 4), ArrowUp: () => move(-size / 4), ArrowRight: () => move(size / 4), ArrowDown: () => move(size / 4) };
    if (!acts[e.key]) return;
    acts[e.key]();
    e.preventDefault();
    e.stopPropagation();
  };
  return (
    <figure class="attention" tabIndex={0} onKeyDown={keys} aria-label={`${t("Attention of layer {layer}, head {head}", { layer, head })}, ${t("{n} tokens", { n: length })}. ${t("Arrow keys move, + and − zoom, 0 shows all.")}`}>
      <div class="attention-tools">
        <span>{t("tokens {a} – {b} of {n}", { a: grouped(start), b: grouped(start + size), n: grouped(length) })}</span>
        {busy && <span class="loading small" />}
        {(tile.branches?.length ?? 0) > 1 && (
          <div class="segments" role="group" aria-label={t("Branch")}>
            {["", ...tile.branches!].map((b) => <button key={b} type="button" aria-pressed={branch === b} onClick={() => setBranch(b)}>{word(b || "both")}</button>)}
          </div>
        )}
        <button type="button" class="icon-button" aria-label={t("Zoom in")} onClick={() => zoom(0.5)}><Icon name="plus" /></button>
        <button type="button" class="icon-button" aria-label={t("Zoom out")} onClick={() => zoom(2)}><Icon name="minus" /></button>
        <button type="button" class="icon-button" aria-label={t("Show all tokens")} onClick={() => setView(null)}><Icon name="reset" /></button>
        <label>{t("contrast")} <input type="range" min="0.15" max="1" step="0.05" value={gamma} onInput={(e) => setGamma(Number((e.target as HTMLInputElement).value))} /></label>
      </div>
      <div class={size <= NAMED ? "attention-body named" : "attention-body"}>
        <Picture matrix={matrix} gamma={gamma} onAt={setAt} onZoom={(f, share) => zoom(f, start + share * size)} onMove={(share) => move(share * size)} />
        {size <= NAMED && <Names tokens={Array.from({ length: size }, (_, i) => token(start + i))} />}
      </div>
      <figcaption>
        <Legend domain={[0, matrix.most]} scale="amount" unit={(v) => percent(v)} />
        <span aria-live="off">
          {at ? <>{t("query")} <b>{grouped(q)} {shown(token(q))}</b> → {t("key")} <b>{grouped(k)} {shown(token(k))}</b>: {figures(weight, 3)}</> : t("Rows are queries, columns are keys; a cell shows the largest weight under it.")}
        </span>
      </figcaption>
    </figure>
  );
}

const shown = (token: string) => (token ? `“${token.replace(/\n/g, "⏎").replace(/\t/g, "⇥")}”` : "");

function Names({ tokens }: { tokens: string[] }) {
  return (
    <>
      <ol class="token-rows" aria-hidden="true">{tokens.map((x, i) => <li key={i} style={{ top: `${((i + 0.5) / tokens.length) * 100}%` }}>{x.replace(/\n/g, "⏎")}</li>)}</ol>
      <ol class="token-columns" aria-hidden="true">{tokens.map((x, i) => <li key={i} style={{ left: `${((i + 0.5) / tokens.length) * 100}%` }}>{x.replace(/\n/g, "⏎")}</li>)}</ol>
    </>
  );
}

interface Matrix {
  side: number;
  values: Float32Array; // attention weights, row by row
  most: number;
  at: (row: number, column: number) => number; // of shares 0..1
}

function unpack(tile: Tile): Matrix {
  const bytes = Uint8Array.from(atob(tile.values), (c) => c.charCodeAt(0));
  const values = Float32Array.from(bytes, (b) => tile.scale * (b / 255) ** tile.gamma);
  const side = Math.round(Math.sqrt(values.length));
  const most = values.reduce((a, b) => Math.max(a, b), 1e-9);
  const clamp = (x: number) => Math.min(side - 1, Math.max(0, Math.floor(x * side)));
  return { side, values, most, at: (r, c) => values[clamp(r) * side + clamp(c)] };
}

function Picture({ matrix, gamma, onAt, onZoom, onMove }: {
  matrix: Matrix;
  gamma: number;
  onAt: (at: [number, number] | null) => void;
  onZoom: (factor: number, share: number) => void;
  onMove: (share: number) => void;
}) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const isDark = useCell(dark);
  const held = useRef<[number, number] | null>(null);
  useEffect(() => {
    const host = canvas.current!;
    host.width = host.height = matrix.side;
    const context = host.getContext("2d")!;
    const image = context.createImageData(matrix.side, matrix.side);
    const pixels = new Uint32Array(image.data.buffer);
    const palette = new Uint32Array(table("amount").buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = palette[Math.round(255 * (matrix.values[i] / matrix.most) ** gamma)];
    context.putImageData(image, 0, 0);
  }, [matrix, gamma, isDark]);
  const share = (e: MouseEvent): [number, number] => {
    const box = canvas.current!.getBoundingClientRect();
    return [(e.clientY - box.top) / box.height, (e.clientX - box.left) / box.width];
  };
  useEffect(() => {
    const host = canvas.current!;
    const wheel = (e: WheelEvent) => {
      if (!e.ctrlKey && !e.shiftKey && document.activeElement !== host.closest("figure")) return;
      e.preventDefault();
      onZoom(e.deltaY > 0 ? 1.4 : 1 / 1.4, share(e)[1]);
    };
    host.addEventListener("wheel", wheel, { passive: false });
    return () => host.removeEventListener("wheel", wheel);
  });
  return (
    <canvas
      ref={canvas}
      class="attention-map"
      onPointerDown={(e) => {
        held.current = share(e);
        canvas.current!.setPointerCapture(e.pointerId);
      }}
      onPointerMove={(e) => onAt(share(e))}
      onPointerUp={(e) => {
        if (held.current) onMove(held.current[1] - share(e)[1]);
        held.current = null;
      }}
      onPointerLeave={() => onAt(null)}
      onDblClick={(e) => onZoom(0.5, share(e)[1])}
    />
  );
}
