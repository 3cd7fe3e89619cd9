// Colours that stay apart for every kind of colour vision: Okabe and Ito's eight for lines, a blue-yellow
// scale after Nuñez et al.'s cividis (2018) for amounts, blue to vermilion for what is signed.

import { Cell } from "./cell";

export const dark = new Cell(false);

const LIGHT = ["#0072b2", "#d55e00", "#00805d", "#b3478a", "#8a6100", "#2a7fb8", "#6b5bd2", "#5c6470"];
const DARK = ["#56b4e9", "#ff8a3d", "#2fc79a", "#e794c2", "#e6b422", "#8fd0f5", "#a99bff", "#aab3c0"];

export const line = (index: number) => (dark.value ? DARK : LIGHT)[index % 8];

type Rgb = readonly [number, number, number];

const CIVIDIS: Rgb[] = [
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
  [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56],
];
const DIVERGING_DARK: Rgb[] = [[86, 180, 233], [38, 98, 140], [22, 30, 42], [160, 72, 20], [255, 128, 51]];
const DIVERGING_LIGHT: Rgb[] = [[0, 90, 160], [120, 178, 215], [246, 247, 249], [240, 160, 105], [200, 76, 0]];

function between(stops: Rgb[], at: number): Rgb {
  const x = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(x), stops.length - 2);
  const f = x - i;
  return [0, 1, 2].map((k) => Math.round(stops[i][k] + f * (stops[i + 1][k] - stops[i][k]))) as unknown as Rgb;
}

export type Scale = "amount" | "signed";

export function shade(scale: Scale, at: number): Rgb {
  return between(scale === "amount" ? CIVIDIS : dark.value ? DIVERGING_DARK : DIVERGING_LIGHT, at);
}

/** 256 colours as a table, for canvases that paint a million cells. */
export function table(scale: Scale): Uint8ClampedArray {
  const out = new Uint8ClampedArray(256 * 4);
  for (let i = 0; i < 256; i++) out.set([...shade(scale, i / 255), 255], i * 4);
  return out;
}

export const css = ([r, g, b]: Rgb) => `rgb(${r},${g},${b})`;

export function token(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
