// Numbers as people read them: at most four figures that count, units said once.

import { lang, t } from "./text";

export const NONE = "–";
const thin = "\u202f";

export function figures(value: number | null | undefined, digits = 4): string {
  if (value === null || value === undefined) return NONE;
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(Math.max(digits - 2, 1)).replace("e+", "e");
  if (size >= 1000) return grouped(Math.round(value));
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(size || 1)));
  const text = value.toFixed(Math.min(places, 6));
  return text.includes(".") ? text.replace(/\.?0+$/, "") || "0" : text;
}

export function grouped(value: number | null | undefined): string {
  if (value === null || value === undefined) return NONE;
  return Math.round(value).toLocaleString("en-US").replaceAll(",", thin);
}

export function short(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]] as const)
    if (size >= limit * 0.99995) return trimmed(value / limit, digits) + letter;
  return size < 1e-3 && size > 0 ? value.toExponential(1) : trimmed(value, digits);
}

const trimmed = (value: number, digits: number) => String(Number(value.toPrecision(digits)));

export function bytes(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  for (const [limit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]] as const)
    if (Math.abs(value) >= limit) return `${trimmed(value / limit, 3)}${thin}${name}`;
  return `${Math.round(value)}${thin}B`;
}

export function percent(value: number | null | undefined, digits = 2): string {
  return value === null || value === undefined || !Number.isFinite(value)
    ? NONE
    : `${trimmed(value * 100, digits)}${thin}%`;
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NONE;
  if (seconds < 1e-3) return `${trimmed(seconds * 1e6, 3)}${thin}µs`;
  if (seconds < 1) return `${trimmed(seconds * 1e3, 3)}${thin}ms`;
  if (seconds < 60) return `${trimmed(seconds, 3)}${thin}s`;
  const zh = lang.value === "zh";
  const [m, h, d] = zh ? ["分", "时", "天"] : ["min", "h", "d"];
  if (seconds < 3600) return `${Math.round(seconds / 60)}${thin}${m}`;
  const pair = (whole: number, a: string, rest: number, b: string) => `${whole}${thin}${a}${rest ? ` ${rest}${thin}${b}` : ""}`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 24 * 60) return pair(Math.floor(minutes / 60), h, minutes % 60, m);
  const hours = Math.round(seconds / 3600);
  return pair(Math.floor(hours / 24), d, hours % 24, h);
}

export function ago(time: number | null | undefined): string {
  if (!time) return NONE;
  const seconds = Math.max(0, Date.now() / 1000 - time);
  const zh = lang.value === "zh";
  if (seconds < 5) return zh ? "刚刚" : "just now";
  return zh ? `${duration(Math.round(seconds))}前` : `${duration(Math.round(seconds))} ago`;
}

export function clock(time: number | null | undefined): string {
  if (!time) return NONE;
  const date = new Date(time * 1000);
  const two = (n: number) => String(n).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}`;
}

/** A value with the unit of its series: bytes and seconds scale themselves, shares read as percent. */
export function measured(value: number | null | undefined, unit = ""): string {
  if (value === null || value === undefined) return NONE;
  if (!Number.isFinite(value)) return String(value);
  if (unit === "bytes" || unit === "B") return bytes(value);
  if (unit === "s" || unit === "seconds") return duration(value);
  if (unit.includes("/s") || unit === "tokens") return `${short(value)}`;
  return figures(value);
}

/** "step 31 217", or "第 31 217 步". */
export const atStep = (step: number | null | undefined) => t("step {n}", { n: grouped(step) });

/** A tick's text; ``gap`` to the next tick says how many figures it takes to tell them apart. */
export function axisValue(value: number, unit = "", gap = 0): string {
  if (value === 0) return "0";
  if (unit === "bytes" || unit === "B") return bytes(value);
  if (unit === "s" || unit === "seconds") return duration(value);
  const size = Math.abs(value);
  const digits = gap ? Math.min(8, Math.max(1, Math.floor(Math.log10(size)) - Math.floor(Math.log10(gap)) + 1)) : 3;
  if (size >= 1e4) return short(value, Math.max(digits, 2));
  if (size < 1e-3) return value.toExponential(Math.min(digits - 1, 2));
  return String(Number(value.toPrecision(Math.max(digits, 2))));
}

/** Steps as 12k where all ticks are whole thousands, else in full. */
export function stepTicks(steps: number[]): string[] {
  const thousands = steps.length > 1 && steps.every((s) => s % 1000 === 0) && steps[steps.length - 1] >= 10_000;
  return steps.map((s) => (thousands ? (s % 1e6 === 0 && s ? `${s / 1e6}M` : s ? `${s / 1000}k` : "0") : grouped(s)));
}
