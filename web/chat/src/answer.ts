// One answer being streamed: what is sent, what comes back, how fast, and what to do when it breaks off.
// Events only add to a record; the page sees it once a frame, however fast tokens come.

import { Cell } from "../../src/cell";
import { Failure, keyWanted, stream } from "./api";
import { type Detail, Details } from "./detail";
import { get, receiving, update } from "./library";
import { modeNow } from "./model";
import { fields, settings } from "./settings";
import { change, type Conversation, type Message, upTo } from "./tree";

/** Of one answer. Tokens are as the server counts them; times are as this page sees them, the network included. */
export interface Numbers {
  prompt?: number;
  cached?: number; // tokens of the prompt that the server still had
  answer?: number;
  first?: number; // s until the first token
  speed?: number; // tokens/s after the first
  seconds?: number;
}

export interface Live {
  text: string;
  thought: string;
  tokens: number; // counted here while it streams
  numbers: Numbers;
  details: readonly Detail[];
}

interface Run {
  cell: Cell<Live>;
  stop: () => void;
  save: () => void;
  conversation: string;
}

export const running = new Cell<ReadonlyMap<string, Run>>(new Map());
/** Token details by message: too large for the browser's storage, so they last as long as the page. */
export const details = new Cell<ReadonlyMap<string, readonly Detail[]>>(new Map());
/** Messages that this page is waiting with for the server to become ready. */
export const waiting = new Set<string>();

const SAVED_EVERY = 2000; // ms: what a crash of the browser in the middle of an answer may lose
/** The ``finish`` of a message while its answer comes. */
export const OPEN = "open";
/** ms without news after which an answer without an end is nobody's any more: no tab receives it. */
export const FORGOTTEN = 4 * SAVED_EVERY;

// Whoever reloads or closes the page in the middle of an answer finds all that had come, and that it broke off.
addEventListener("pagehide", () => running.value.forEach((run) => run.save()));

interface Choice {
  delta?: { content?: string | null; reasoning_content?: string | null; reasoning?: string | null };
  text?: string;
  finish_reason?: string | null;
  logprobs?: unknown;
  trace?: unknown;
}
interface Usage {
  prompt_tokens?: number;
  completion_tokens?: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
}

export const stopAnswer = (id: string) => running.value.get(id)?.stop();

/** Ask for message ``id``: from its beginning, or (``onward``) for what follows the text it has. */
export async function ask(conversation: string, id: string, onward = false): Promise<void> {
  const c = get(conversation);
  if (!c?.messages[id] || running.value.has(id)) return;
  const before = onward ? c.messages[id] : null;
  const abort = new AbortController();
  const record = new Received(before, onward ? (details.value.get(id) ?? []) : []);
  const cell = new Cell<Live>(record.live());
  waiting.delete(id);
  const { model } = settings.value;
  const keep = (part: Partial<Message>) => update(conversation, (now) => change(now, id, part));
  const received = () => ({ text: record.text, thought: record.thought || undefined });
  const save = () => keep({ ...received(), finish: undefined, trouble: { kind: "lost", text: "" } });
  running.value = new Map(running.value).set(id, { cell, stop: () => abort.abort(), save, conversation });
  receiving.add(id);
  keep({ trouble: undefined, finish: OPEN, text: before?.text ?? "", thought: before?.thought, numbers: undefined, model });
  const frames = new Frames(() => (cell.value = record.live()));
  let saved = Date.now();
  let end: Partial<Message> = {};
  try {
    for await (const event of stream(...requestOf(c, c.messages[id], onward), abort.signal)) {
      record.take(event);
      frames.ask();
      if (Date.now() - saved > SAVED_EVERY) {
        saved = Date.now();
        keep(received());
      }
      if (!get(conversation)?.messages[id]) abort.abort(); // deleted, here or in another tab
    }
    end = { finish: record.finish || "stop" };
  } catch (error) {
    // An answer whose end was told is whole, whatever the connection did afterwards.
    if (record.finish && error instanceof Failure && error.trouble === "lost") end = { finish: record.finish };
    else end = abort.signal.aborted ? { finish: "abort" } : { finish: undefined, trouble: troubleOf(error, record.started) };
  }
  frames.end();
  const live = record.live();
  if (live.details.length) details.value = new Map(details.value).set(id, live.details);
  else if (!onward && details.value.has(id)) details.value = new Map([...details.value].filter(([key]) => key !== id));
  keep({ text: live.text, thought: live.thought || undefined, numbers: live.numbers, ...end });
  receiving.delete(id);
  const left = new Map(running.value);
  left.delete(id);
  running.value = left;
  if (end.trouble?.kind === "key") keyWanted.value = { why: end.trouble.text, again: () => void ask(conversation, id, onward) };
  if (end.trouble?.kind === "starting") waiting.add(id);
}

function troubleOf(error: unknown, started: boolean): Message["trouble"] {
  if (!(error instanceof Failure)) return { kind: "server", text: String((error as Error).message ?? error) };
  const kind = started && ["unreached", "server", "starting"].includes(error.trouble) ? "lost" : error.trouble;
  const until = kind === "busy" ? Date.now() + 1000 * (error.retryAfter || 1) : undefined;
  return { kind, text: error.message, ...(until ? { until } : {}) };
}

function requestOf(c: Conversation, message: Message, onward: boolean): [string, Record<string, unknown>] {
  const said = upTo(c, onward ? message.id : message.parent);
  const asked = fields(settings.value, modeNow());
  if (modeNow() === "text") return ["v1/completions", { ...asked, prompt: [c.system, ...said.map((m) => m.text)].join("") }];
  const content = (m: Message) => (m.role === "assistant" && !(onward && m.id === message.id) ? parted(m.text).text : m.text);
  const messages = said.filter((m) => m.text || m.role === "user").map((m) => ({ role: m.role, content: content(m) }));
  if (c.system) messages.unshift({ role: "system" as never, content: c.system });
  const more = onward ? { continue_final_message: true, add_generation_prompt: false } : {};
  return ["v1/chat/completions", { ...asked, messages, ...more }];
}

/** Some models put their thoughts into the text, between ``<think>`` and ``</think>``; templates want them left out later. */
export function parted(text: string): { text: string; thought: string } {
  const match = /^\s*<think>([^]*?)(?:<\/think>|$)/.exec(text);
  return match ? { text: text.slice(match[0].length).trimStart(), thought: match[1].trim() } : { text, thought: "" };
}

/** What has come so far. */
class Received {
  text: string;
  thought: string;
  finish = "";
  started = false;
  private begun = performance.now();
  private first = 0;
  private last = 0;
  private counted = 0;
  private firstCount = 0;
  private usage: Usage = {};
  private list: Details;

  constructor(before: Message | null, known: readonly Detail[]) {
    this.text = before?.text ?? "";
    this.thought = before?.thought ?? "";
    this.list = new Details(known);
  }

  take(event: Record<string, unknown>): void {
    if (event.usage) this.usage = event.usage as Usage;
    const choice = (event.choices as Choice[] | undefined)?.[0];
    if (!choice) return;
    const text = choice.delta?.content ?? choice.text ?? "";
    const thought = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
    const known = this.list.take(choice.trace, choice.logprobs);
    const tokens = known || (text || thought ? 1 : 0);
    if (tokens) {
      this.last = performance.now();
      if (!this.first) [this.first, this.firstCount] = [this.last, tokens];
      this.counted += tokens;
      this.started = true;
    }
    this.text += text;
    this.thought += thought;
    if (choice.finish_reason) this.finish = choice.finish_reason;
  }

  live(): Live {
    const { text, thought, counted: tokens } = this;
    return { text, thought, tokens, numbers: this.numbers(), details: this.list.all() };
  }

  private numbers(): Numbers {
    const out: Numbers = {};
    const answer = this.usage.completion_tokens ?? this.counted;
    const later = answer - this.firstCount;
    if (this.usage.prompt_tokens !== undefined) out.prompt = this.usage.prompt_tokens;
    if (this.usage.prompt_tokens_details?.cached_tokens !== undefined) out.cached = this.usage.prompt_tokens_details.cached_tokens;
    if (answer) out.answer = answer;
    if (this.first) {
      out.first = (this.first - this.begun) / 1000;
      out.seconds = (this.last - this.begun) / 1000;
      if (later > 0 && this.last > this.first) out.speed = (later * 1000) / (this.last - this.first);
    }
    return out;
  }
}

/** Calls ``show`` once a frame at most, and also in a tab that is hidden, where no frames come. What takes long to draw is
 * drawn seldom: three quarters of the time are the reader's. */
class Frames {
  private asked = false;
  private ended = false;
  private cost = 0; // ms that the last drawing took
  constructor(private show: () => void) {}
  ask(): void {
    if (this.asked) return;
    this.asked = true;
    const go = () => {
      if (!this.asked || this.ended) return;
      this.asked = false;
      const began = performance.now();
      this.show();
      setTimeout(() => (this.cost = performance.now() - began)); // after the drawing
    };
    if (document.hidden) setTimeout(go, 250);
    else if (this.cost > 30) setTimeout(go, 3 * this.cost);
    else requestAnimationFrame(go);
  }
  end(): void {
    this.ended = true;
    this.show();
  }
}
