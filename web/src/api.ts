// The server's answers (deepseek/monitor/api.py), and the only place that talks to it.

export type Severity = "info" | "warning" | "critical";
export type Text = { en: string; zh: string };

export interface RunCard {
  id: string;
  name: string;
  status: string;
  step: number | null;
  total_steps: number | null;
  loss: number | null;
  tokens_per_second: number | null;
  started: number | null;
  updated: number | null;
  incidents_open: number;
  device: string | null;
  parameters: number | null;
  spark: (number | null)[];
  error?: string; // a damaged run has an id, a name, a status and this
}

export interface Checkpoint {
  step: number;
  path?: string;
  time?: number;
  bytes?: number;
  [key: string]: unknown;
}

export interface RunInfo extends RunCard {
  facts: Record<string, unknown>;
  config: string;
  checkpoints: Checkpoint[];
  pages: string[];
}

export interface SeriesInfo {
  name: string;
  group: string;
  unit: string;
  description: Text;
  last: number | null;
  step: number | null;
}

export interface Window {
  step: number[];
  low: (number | null)[];
  high: (number | null)[];
  mean: (number | null)[];
  raw: boolean;
  nonfinite?: [number, string][];
}

export interface Evidence {
  text: string;
  series?: string;
  step?: number;
  value?: number | null;
  score?: number | null;
}
export interface Mover {
  name: string;
  step: number;
  score: number | null;
  before: number | null;
  after: number | null;
}
export interface Sample {
  row: number;
  column?: number;
  length?: number;
  source?: string;
  path?: string;
  offset?: number;
  start?: number;
  loss?: number | null;
  text?: string;
}
export interface Incident {
  id: string;
  step: number;
  first_step: number;
  kind: string;
  severity: Severity;
  verdict: string;
  confidence: number;
  title: string;
  summary: string;
  evidence: Evidence[];
  movers: Mover[];
  window: [number, number];
  samples: Sample[];
  gradient_map: { layers: (number | string)[]; steps: number[]; values: (number | null)[][] } | null;
  status: "open" | "acknowledged" | "resolved";
  actions: { action: string; [key: string]: unknown }[]; // what was done about it
  siblings?: { run: string; step?: number; loss?: number | null; text?: string; [key: string]: unknown }[];
  time?: number;
}

export interface Command {
  id: string | number;
  action: string;
  status: string;
  by?: string;
  time?: number;
  created?: number;
  finished?: number | null;
  arguments?: Record<string, unknown>;
  result?: unknown;
  incident?: string | null;
}

/** The server tells the store's lines and the log's events apart; the page wants one list without doubles. */
export function lineageOf(answer: { lines: Record<string, unknown>[]; events: Record<string, unknown>[] } | LineageItem[] | null): LineageItem[] {
  if (!answer) return [];
  if (Array.isArray(answer)) return answer;
  const lines = answer.lines.map(({ data, ...line }) => ({ ...(data as object), ...line }) as LineageItem);
  const kind = (x: LineageItem) => x.kind ?? x.event;
  const told = (e: LineageItem) =>
    lines.some((x) => kind(x) === kind(e) && x.step === e.step && Math.abs((x.time ?? 0) - (e.time ?? 0)) < 5);
  return [...lines, ...(answer.events as LineageItem[]).filter((e) => !told(e))];
}

export interface LineageItem {
  kind?: string;
  event?: string;
  step?: number | null;
  time?: number | null;
  [key: string]: unknown;
}

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

export const runPath = (id: string, rest = "") =>
  `api/runs/${id.split("/").map(encodeURIComponent).join("/")}${rest}`;

async function answer<T>(response: Response): Promise<T> {
  if (response.ok) return (await response.json()) as T;
  const body = await response.text();
  let said = body.slice(0, 300);
  try {
    const parsed = JSON.parse(body);
    const found = parsed.error?.message ?? parsed.error ?? parsed.detail ?? parsed.message;
    if (typeof found === "string") said = found;
  } catch {
    // not JSON: the text itself is the message
  }
  throw new ApiError(said || response.statusText, response.status);
}

const early = new Map<string, Promise<unknown>>();

/** Ask before the first drawing for what it will need; each answer serves the first ``get`` of its path. */
export function ahead(paths: string[]): void {
  for (const path of paths) {
    const answer = get(path);
    answer.catch(() => undefined); // whoever gets it sees the error
    early.set(path, answer);
  }
}

export async function get<T>(path: string, query: Record<string, unknown> = {}): Promise<T> {
  const whole = path + search(query);
  const asked = early.get(whole);
  early.delete(whole);
  if (asked) return asked as Promise<T>;
  return answer<T>(await fetch(whole, { headers: { Accept: "application/json" } }));
}

export async function send<T>(method: "POST" | "PATCH", path: string, body: unknown): Promise<T> {
  const headers = { "Content-Type": "application/json", "X-Deepseek": "1" };
  return answer<T>(await fetch(path, { method, headers, body: JSON.stringify(body) }));
}

export function search(query: Record<string, unknown>): string {
  const parts = new URLSearchParams();
  for (const [key, value] of Object.entries(query))
    for (const one of Array.isArray(value) ? value : [value])
      if (one !== undefined && one !== null && one !== "") parts.append(key, String(one));
  const text = parts.toString();
  return text ? `?${text}` : "";
}

// Panels that ask for the same window in the same moment share one request.

interface Asked {
  names: Map<string, ((w: Window | null, e?: Error) => void)[]>;
  run: string;
  query: Record<string, unknown>;
}
const asked = new Map<string, Asked>();

export function readSeries(
  run: string,
  name: string,
  query: { start?: number; stop?: number; points: number },
): Promise<Window | null> {
  const key = JSON.stringify([run, query]);
  let group = asked.get(key);
  if (!group) {
    group = { names: new Map(), run, query };
    asked.set(key, group);
    queueMicrotask(() => flush(key));
  }
  const waiting = group.names.get(name) ?? [];
  group.names.set(name, waiting);
  return new Promise((resolve, reject) => waiting.push((w, e) => (e ? reject(e) : resolve(w))));
}

async function flush(key: string): Promise<void> {
  const group = asked.get(key)!;
  asked.delete(key);
  const names = [...group.names.keys()];
  for (let i = 0; i < names.length; i += 12) {
    const part = names.slice(i, i + 12);
    get<Record<string, Window>>(runPath(group.run, "/data"), { name: part, ...group.query }).then(
      (found) => part.forEach((n) => group.names.get(n)!.forEach((done) => done(found[n] ?? null))),
      (error) => part.forEach((n) => group.names.get(n)!.forEach((done) => done(null, error))),
    );
  }
}
