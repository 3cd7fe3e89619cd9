// What is asked of the server with every question: sampling, format, token details. Unset means the server's own default.

import { Cell, remember, remembered } from "../../src/cell";

export interface Settings {
  model: string;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  max_tokens?: number;
  seed?: number;
  stop: string[];
  presence_penalty?: number;
  frequency_penalty?: number;
  repetition_penalty?: number;
  format: "text" | "json_object" | "json_schema";
  schema: string;
  mode: "chat" | "text"; // text: the words alone, for a model without a chat template
  trace: boolean;
  logprobs: boolean;
  alternatives: number;
}

export type NumberName = "temperature" | "top_p" | "top_k" | "min_p" | "max_tokens" | "seed" | "presence_penalty" | "frequency_penalty" | "repetition_penalty";

export interface Dial {
  name: NumberName;
  label: string;
  about: string;
  low: number;
  high: number;
  step: number;
  usual: number; // where the slider stands while nothing is set
  slider: boolean;
}

export const DIALS: Dial[] = [
  { name: "temperature", label: "Temperature", about: "0: always the most likely token. Higher: more varied.", low: 0, high: 2, step: 0.05, usual: 0.8, slider: true },
  { name: "top_p", label: "Top-p", about: "Draw from the smallest set of tokens with this much probability.", low: 0.01, high: 1, step: 0.01, usual: 1, slider: true },
  { name: "top_k", label: "Top-k", about: "Draw from the k most likely tokens. 0: from all.", low: 0, high: 200, step: 1, usual: 0, slider: true },
  { name: "min_p", label: "Min-p", about: "Leave out tokens less likely than this share of the most likely one.", low: 0, high: 1, step: 0.01, usual: 0, slider: true },
  { name: "max_tokens", label: "Longest answer", about: "In tokens.", low: 1, high: 1e6, step: 1, usual: 512, slider: false },
  { name: "seed", label: "Seed", about: "The same seed and question give the same answer.", low: 0, high: Number.MAX_SAFE_INTEGER, step: 1, usual: 0, slider: false },
  { name: "presence_penalty", label: "Presence penalty", about: "Against tokens that were said at all.", low: -2, high: 2, step: 0.1, usual: 0, slider: true },
  { name: "frequency_penalty", label: "Frequency penalty", about: "Against tokens, by how often they were said.", low: -2, high: 2, step: 0.1, usual: 0, slider: true },
  { name: "repetition_penalty", label: "Repetition penalty", about: "Divides the scores of tokens that were read or said. 1: off.", low: 0.5, high: 2, step: 0.05, usual: 1, slider: true },
];

export const DEFAULTS: Settings = { model: "", stop: [], format: "text", schema: "", mode: "chat", trace: false, logprobs: false, alternatives: 5 };

/** Presets change how tokens are drawn, not the model or what is shown. */
export const BUILT_IN: Record<string, Partial<Settings>> = {
  "Server's defaults": {},
  Precise: { temperature: 0 },
  Balanced: { temperature: 0.7, top_p: 0.95 },
  Creative: { temperature: 1.1, min_p: 0.05 },
};

function kept<T extends object>(key: string, fallback: T): T {
  try {
    const value = JSON.parse(remembered(key, "null"));
    return value && typeof value === "object" && !Array.isArray(value) ? { ...fallback, ...value } : fallback;
  } catch {
    return fallback;
  }
}

export const settings = new Cell<Settings>(kept("chat.settings", DEFAULTS));
export const presets = new Cell<Record<string, Partial<Settings>>>(kept("chat.presets", {}));

export function set(change: Partial<Settings>): void {
  const next = { ...settings.value, ...change };
  for (const { name } of DIALS) if (next[name] === undefined || Number.isNaN(next[name])) delete next[name];
  settings.value = next;
  remember("chat.settings", JSON.stringify(next));
}

/** Back to the server's defaults; the model, the mode and the views stay. */
export function reset(): void {
  apply({});
}

function drawing(s: Settings): Partial<Settings> {
  const { model: _m, mode: _o, trace: _t, logprobs: _l, alternatives: _a, ...rest } = s;
  return rest;
}

export function apply(preset: Partial<Settings>): void {
  const { model, mode, trace, logprobs, alternatives } = settings.value;
  settings.value = { ...DEFAULTS, ...drawing({ ...DEFAULTS, ...preset }), model, mode, trace, logprobs, alternatives };
  remember("chat.settings", JSON.stringify(settings.value));
}

/** The preset that the settings equal now, or "". */
export function matching(s: Settings, own: Record<string, Partial<Settings>>): string {
  const flat = (x: Partial<Settings>) => JSON.stringify(Object.entries(drawing({ ...DEFAULTS, ...x })).sort());
  const now = flat(s);
  return Object.entries({ ...BUILT_IN, ...own }).find(([, p]) => flat(p) === now)?.[0] ?? "";
}

export function savePreset(name: string): void {
  presets.value = { ...presets.value, [name]: drawing(settings.value) };
  remember("chat.presets", JSON.stringify(presets.value));
}

export function forgetPreset(name: string): void {
  const { [name]: _, ...rest } = presets.value;
  presets.value = rest;
  remember("chat.presets", JSON.stringify(rest));
}

/** The schema as a value, or why it is none. */
export function schemaOf(text: string): { value?: object; wrong?: string } {
  if (!text.trim()) return { wrong: "" };
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" && !Array.isArray(value) ? { value } : { wrong: "a schema is an object: {…}" };
  } catch (error) {
    return { wrong: (error as Error).message };
  }
}

/** The settings as fields of a request; ``messages`` or ``prompt`` come beside them. */
export function fields(s: Settings, mode: Settings["mode"]): Record<string, unknown> {
  const out: Record<string, unknown> = { model: s.model, stream: true, stream_options: { include_usage: true } };
  for (const { name } of DIALS) if (s[name] !== undefined) out[name] = s[name];
  if (s.stop.length) out.stop = s.stop;
  const schema = schemaOf(s.schema).value;
  if (s.format === "json_object" && mode === "chat") out.response_format = { type: "json_object" };
  if (s.format === "json_schema" && schema && mode === "chat") out.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  if (s.trace) out.trace = true;
  if (s.logprobs && mode === "chat") Object.assign(out, { logprobs: true, top_logprobs: s.alternatives });
  if (s.logprobs && mode === "text") out.logprobs = s.alternatives;
  return out;
}
