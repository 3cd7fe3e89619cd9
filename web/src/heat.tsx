// A heat map on a canvas: rows × columns of numbers, one colour table, a cell under the pointer or the arrows.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { useCell } from "./cell";
import { figures } from "./format";
import { css, dark, type Scale, shade, table } from "./palette";
import { t } from "./text";

export interface HeatProps {
  title: string;
  rows: string[];
  columns: (number | string)[];
  values: (number | null)[][]; // [row][column]
  scale?: Scale;
  domain?: [number, number]; // values of the ends of the colour table
  cell?: number; // height of a row, px
  say?: (row: number, column: number, value: number | null) => string;
  onPick?: (row: number, column: number) => void;
  picked?: [number, number] | null;
  unit?: (value: number) => string;
  columnLabel?: string;
  grid?: boolean; // gaps between cells: for few, clickable ones
  mark?: { column: number | string; severity: string }[];
}

export function extent(values: (number | null)[][]): [number, number] {
  let low = Infinity;
  let high = -Infinity;
  for (const row of values)
    for (const v of row)
      if (v !== null && Number.isFinite(v)) {
        low = Math.min(low, v);
        high = Math.max(high, v);
      }
  return low <= high ? (low === high ? [low, low + 1e-9] : [low, high]) : [0, 1];
}

export function Heat(props: HeatProps) {
  const { rows, columns, values, scale = "amount", title, say, onPick, picked, grid } = props;
  const canvas = useRef<HTMLCanvasElement>(null);
  const isDark = useCell(dark);
  const [at, setAt] = useState<[number, number] | null>(null);
  const domain = useMemo(() => props.domain ?? extent(values), [values, props.domain?.[0], props.domain?.[1]]);
  const height = props.cell ?? Math.min(Math.max(Math.floor(240 / Math.max(rows.length, 1)), 4), 22);

  useEffect(() => paint(canvas.current!, values, rows.length, columns.length, domain, scale, Boolean(grid)), [
    values, domain[0], domain[1], scale, isDark, rows.length, columns.length, grid,
  ]);

  const value = at ? (values[at[0]]?.[at[1]] ?? null) : null;
  const words = at
    ? say
      ? say(at[0], at[1], value)
      : `${rows[at[0]]} · ${columns[at[1]]}: ${value === null ? t("not logged") : figures(value)}`
    : "";
  const cellAt = (e: MouseEvent): [number, number] | null => {
    const box = canvas.current!.getBoundingClientRect();
    const r = Math.floor(((e.clientY - box.top) / box.height) * rows.length);
    const c = Math.floor(((e.clientX - box.left) / box.width) * columns.length);
    return r >= 0 && r < rows.length && c >= 0 && c < columns.length ? [r, c] : null;
  };
  const key = (e: KeyboardEvent) => {
    const [r, c] = at ?? [0, -1];
    const next: Record<string, [number, number]> = {
      ArrowUp: [r - 1, Math.max(c, 0)],
      ArrowDown: [r + 1, Math.max(c, 0)],
      ArrowLeft: [r, c - 1],
      ArrowRight: [r, c + 1],
      Home: [r, 0],
      End: [r, columns.length - 1],
    };
    if ((e.key === "Enter" || e.key === " ") && at && onPick) onPick(...at);
    else if (next[e.key]) {
      const [y, x] = next[e.key];
      setAt([Math.min(Math.max(y, 0), rows.length - 1), Math.min(Math.max(x, 0), columns.length - 1)]);
    } else return;
    e.preventDefault();
    e.stopPropagation();
  };
  const every = Math.max(1, Math.ceil(13 / height));
  const spot = (cell: [number, number], name: string) => (
    <i
      class={name}
      style={{
        left: `${(cell[1] / columns.length) * 100}%`,
        top: `${(cell[0] / rows.length) * 100}%`,
        width: `${(100 / columns.length) * (grid ? 11 / 12 : 1)}%`,
        height: `${(100 / rows.length) * (grid ? 11 / 12 : 1)}%`,
      }}
    />
  );
  return (
    <figure
      class="heat"
      tabIndex={0}
      aria-label={`${title}: ${rows.length} × ${columns.length}. ${t("Arrow keys move between cells.")}`}
      onKeyDown={key}
      onBlur={() => setAt(null)}
    >
      <div class="heat-body">
        <div class="heat-rows" aria-hidden="true" style={{ height: `${height * rows.length}px` }}>
          {rows.map((row, i) => (i % every === 0 ? <span key={i} style={{ top: `${((i + 0.5) / rows.length) * 100}%` }}>{row}</span> : null))}
        </div>
        <div class={onPick ? "heat-cells picks" : "heat-cells"} style={{ height: `${height * rows.length}px` }}>
          <canvas
            ref={canvas}
            onPointerMove={(e) => setAt(cellAt(e))}
            onPointerLeave={() => setAt(null)}
            onClick={(e) => {
              const cell = cellAt(e);
              if (cell && onPick) onPick(...cell);
            }}
          />
          {props.mark?.map(({ column, severity }) => {
            const c = columns.indexOf(column);
            return c < 0 ? null : <i key={String(column)} class={`heat-mark ${severity}`} style={{ left: `${((c + 0.5) / columns.length) * 100}%` }} />;
          })}
          {picked && spot(picked, "heat-picked")}
          {at && spot(at, "heat-at")}
        </div>
        <div class="heat-columns" aria-hidden="true">
          {ends(columns).map(([text, share]) => (
            <span key={share} style={{ left: `${share * 100}%` }} class={share === 0 ? "first" : share === 1 ? "last" : ""}>{text}</span>
          ))}
        </div>
      </div>
      <figcaption>
        <Legend domain={domain} scale={scale} unit={props.unit ?? figures} />
        <span class="heat-words" aria-live="polite">{words || props.columnLabel}</span>
      </figcaption>
    </figure>
  );
}

function ends(columns: (number | string)[]): [string, number][] {
  const n = columns.length;
  if (!n) return [];
  if (n <= 24) return columns.map((c, i) => [String(c), (i + 0.5) / n]);
  return [0, 0.25, 0.5, 0.75, 1].map((f) => [String(columns[Math.min(n - 1, Math.round(f * (n - 1)))]), f]);
}

export function Legend({ domain, scale, unit }: { domain: [number, number]; scale: Scale; unit: (v: number) => string }) {
  useCell(dark);
  const stops = Array.from({ length: 9 }, (_, i) => css(shade(scale, i / 8))).join(",");
  return (
    <span class="ramp">
      <small>{unit(domain[0])}</small>
      <i style={{ background: `linear-gradient(90deg,${stops})` }} aria-hidden="true" />
      <small>{unit(domain[1])}</small>
    </span>
  );
}

/** One pixel a cell, enlarged without smoothing by the style sheet; empty cells stay transparent. */
function paint(
  canvas: HTMLCanvasElement,
  values: (number | null)[][],
  rows: number,
  columns: number,
  [low, high]: [number, number],
  scale: Scale,
  grid: boolean,
): void {
  const k = grid ? 12 : 1;
  canvas.width = Math.max(columns, 1) * k;
  canvas.height = Math.max(rows, 1) * k;
  const context = canvas.getContext("2d")!;
  const colours = table(scale);
  const image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  const palette = new Uint32Array(colours.buffer);
  for (let r = 0; r < rows; r++)
    for (let c = 0; c < columns; c++) {
      const v = values[r]?.[c];
      if (v === null || v === undefined || !Number.isFinite(v)) continue;
      const colour = palette[Math.round(Math.min(Math.max((v - low) / (high - low || 1), 0), 1) * 255)];
      for (let y = 0; y < (grid ? k - 1 : k); y++)
        for (let x = 0; x < (grid ? k - 1 : k); x++) pixels[(r * k + y) * canvas.width + c * k + x] = colour;
    }
  context.putImageData(image, 0, 0);
}
