// What the server tells of each token of an answer, and sums over it.
//
// ``trace`` is an extension of this server: an answer asked with ``"trace": true`` has in each streamed choice
//   "trace": [{"id": 42, "token": " the", "experts": [[layer, [[expert, gate], …]], …], "gates": [[layer, share], …]}]
// one entry for each token of the chunk. ``experts``: for every expert layer the experts that worked on the step that
// produced the token, largest gate first. ``gates``: for every hybrid layer the mean share of its global branch.
// ``logprobs`` is OpenAI's.

export interface Detail {
  text: string;
  id?: number;
  logprob?: number; // nats
  top?: [string, number][]; // alternatives, the likeliest first
  experts?: Map<number, [number, number][]>; // layer → [expert, gate]
  gates?: Map<number, number>; // layer → share of the global branch
}

interface Traced {
  id?: number;
  token?: string;
  token_id?: number; // other names of the first two
  text?: string;
  experts?: [number, [number, number][]][];
  gates?: [number, number][];
}
interface ChatLogprobs {
  content?: { token: string; logprob: number; top_logprobs?: { token: string; logprob: number }[] }[] | null;
}
interface TextLogprobs {
  tokens?: string[];
  token_logprobs?: (number | null)[];
  top_logprobs?: (Record<string, number> | null)[] | null;
}

const MOST = 20_000; // tokens whose details are kept

/** Grows with the chunks of an answer; traces and log-probabilities of a token meet by their order. */
export class Details {
  private list: Detail[];
  private traced: number;
  private weighed: number;

  constructor(known: readonly Detail[]) {
    this.list = [...known];
    this.traced = this.weighed = known.length;
  }

  /** How many tokens the chunk told of. */
  take(trace: unknown, logprobs: unknown): number {
    const traces = Array.isArray(trace) ? (trace as Traced[]) : [];
    const probs = weights(logprobs);
    if (this.list.length >= MOST) return Math.max(traces.length, probs.length);
    for (const each of probs) this.put(this.weighed++, each);
    for (const { token_id, id = token_id, token, text = token, experts, gates } of traces) {
      const found: Detail = { text: text ?? "" };
      if (id !== undefined) found.id = id;
      if (experts?.length) found.experts = new Map(experts);
      if (gates?.length) found.gates = new Map(gates);
      this.put(this.traced++, found);
    }
    return Math.max(traces.length, probs.length);
  }

  private put(at: number, part: Detail): void {
    const before = this.list[at];
    this.list[at] = before ? { ...before, ...part, text: part.text || before.text } : part;
  }

  all(): readonly Detail[] {
    return this.list.length ? [...this.list] : NONE;
  }
}
const NONE: readonly Detail[] = [];

function weights(logprobs: unknown): Detail[] {
  const chat = (logprobs as ChatLogprobs | null)?.content;
  if (chat) return chat.map(({ token, logprob, top_logprobs }) => ({ text: token, logprob, top: (top_logprobs ?? []).map((x) => [x.token, x.logprob]) }));
  const { tokens, token_logprobs, top_logprobs } = (logprobs ?? {}) as TextLogprobs;
  return (tokens ?? []).map((text, i) => {
    const top = Object.entries(top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]);
    return { text, ...(token_logprobs?.[i] != null ? { logprob: token_logprobs[i] } : {}), top };
  });
}

/** The layers that any token tells of, in order. */
export function layersOf(all: readonly Detail[], what: "experts" | "gates"): number[] {
  const found = new Set<number>();
  for (const one of all) for (const layer of one[what]?.keys() ?? []) found.add(layer);
  return [...found].sort((a, b) => a - b);
}

/** How often each expert of a layer was used: counts, and the sum of its gates. */
export function loadOf(all: readonly Detail[], layer: number): { uses: number[]; gates: number[]; tokens: number } {
  const [uses, gates]: [number[], number[]] = [[], []];
  let tokens = 0;
  for (const one of all) {
    const used = one.experts?.get(layer);
    if (!used) continue;
    tokens++;
    for (const [expert, gate] of used) {
      uses[expert] = (uses[expert] ?? 0) + 1;
      gates[expert] = (gates[expert] ?? 0) + gate;
    }
  }
  return { uses: Array.from(uses, (n) => n ?? 0), gates: Array.from(gates, (n) => n ?? 0), tokens };
}

/** The class of a probability: 0 for the surprising, 4 for the sure. */
export function sureness(logprob: number | undefined): number | null {
  if (logprob === undefined) return null;
  const p = Math.exp(logprob);
  return p < 0.05 ? 0 : p < 0.2 ? 1 : p < 0.5 ? 2 : p < 0.9 ? 3 : 4;
}

/** A token's text with what cannot be seen made visible. */
export const visible = (text: string) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
