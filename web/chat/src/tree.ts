// A conversation is a tree: an edited question or a second answer is a sibling, and one path through it is shown.
// All values are immutable; a change gives a new conversation that shares the rest.

import type { Numbers } from "./answer";
import type { Trouble } from "./api";

export interface Message {
  id: string;
  parent: string | null;
  role: "user" | "assistant";
  text: string;
  thought?: string; // what a reasoning model said to itself
  time: number; // ms
  changes?: number; // so far: of two tabs' versions the one with more is the later
  model?: string;
  numbers?: Numbers;
  finish?: string; // why the answer ended
  trouble?: { kind: Trouble; text: string; until?: number }; // until: when the server may be asked again, ms
}

export interface Conversation {
  id: string;
  title: string;
  named?: boolean; // by the reader, not by its first question
  system: string;
  created: number;
  updated: number;
  messages: Record<string, Message>;
  order: string[]; // ids by creation: the order of siblings
  chosen: Record<string, string>; // parent (or ROOT) → the child that is shown
}

const ROOT = "";
let last = 0;

export function newId(): string {
  last = Math.max(last + 1, Date.now()); // never twice in a page
  return last.toString(36) + Math.random().toString(36).slice(2, 8);
}

export function conversation(system = ""): Conversation {
  const now = Date.now();
  return { id: newId(), title: "", system, created: now, updated: now, messages: {}, order: [], chosen: {} };
}

export function children(c: Conversation, parent: string | null): string[] {
  return c.order.filter((id) => c.messages[id].parent === parent);
}

/** The messages that are shown, first to last. */
export function path(c: Conversation): Message[] {
  const byParent = new Map<string, string[]>();
  for (const id of c.order) {
    const parent = c.messages[id].parent ?? ROOT;
    const list = byParent.get(parent);
    if (list) list.push(id);
    else byParent.set(parent, [id]);
  }
  const out: Message[] = [];
  for (let at = ROOT; ; ) {
    const next = byParent.get(at);
    if (!next) return out;
    const chosen = next.includes(c.chosen[at]) ? c.chosen[at] : next[next.length - 1];
    out.push(c.messages[chosen]);
    at = chosen;
  }
}

/** The messages from the first one to ``id``. */
export function upTo(c: Conversation, id: string | null): Message[] {
  const out: Message[] = [];
  for (let at = id; at !== null; at = c.messages[at].parent) out.push(c.messages[at]);
  return out.reverse();
}

const choose = (chosen: Record<string, string>, parent: string | null, id: string) => ({ ...chosen, [parent ?? ROOT]: id });

export function add(c: Conversation, message: Message): Conversation {
  const title = c.title || (message.role === "user" ? titleFrom(message.text) : "");
  return {
    ...c,
    title,
    updated: Date.now(),
    messages: { ...c.messages, [message.id]: message },
    order: [...c.order, message.id],
    chosen: choose(c.chosen, message.parent, message.id),
  };
}

export function change(c: Conversation, id: string, part: Partial<Message>): Conversation {
  if (!c.messages[id]) return c;
  const changed = { ...c.messages[id], ...part, changes: changes(c.messages[id]) + 1 };
  return { ...c, updated: Date.now(), messages: { ...c.messages, [id]: changed } };
}

/** Show the sibling ``by`` places further on; the rest of its own branch comes with it. */
export function turn(c: Conversation, id: string, by: number): Conversation {
  const { parent } = c.messages[id];
  const siblings = children(c, parent);
  const next = siblings[siblings.indexOf(id) + by];
  return next ? { ...c, chosen: choose(c.chosen, parent, next) } : c;
}

/** Two tabs' versions of one conversation as one: no message is lost, and of each the version with more changes counts. */
export function merge(theirs: Conversation, mine: Conversation): Conversation {
  const messages = { ...mine.messages };
  for (const id of theirs.order) {
    const [a, b] = [theirs.messages[id], mine.messages[id]];
    messages[id] = b && changes(b) > changes(a) ? b : a;
  }
  const order = [...theirs.order, ...mine.order.filter((id) => !Object.hasOwn(theirs.messages, id))];
  const named = mine.named && !theirs.named ? { title: mine.title, named: true } : {};
  return { ...theirs, ...named, updated: Math.max(theirs.updated, mine.updated), messages, order, chosen: { ...mine.chosen, ...theirs.chosen } };
}

/** Whether ``c`` lacks a message of ``whole``, or has an older version of one that is not among ``growing``. */
export function lacks(c: Conversation, whole: Conversation, growing: ReadonlySet<string>): boolean {
  return whole.order.some((id) => !Object.hasOwn(c.messages, id) || (!growing.has(id) && changes(c.messages[id]) < changes(whole.messages[id])));
}

const changes = (m: Message) => m.changes ?? 0;

export function titleFrom(text: string): string {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  const letters = [...line];
  return letters.length > 60 ? `${letters.slice(0, 57).join("")}…` : line;
}

const text = (x: unknown) => (typeof x === "string" ? x : "");
const number = (x: unknown) => (typeof x === "number" && Number.isFinite(x) ? x : undefined);
const isId = (x: unknown): x is string => typeof x === "string" && /^(?!__)[\w-]{1,64}$/.test(x);
const KINDS: Trouble[] = ["key", "busy", "starting", "lost", "unreached", "refused", "server"];

function checkedMessage(id: string, m: Partial<Message>, parent: string | null): Message {
  const out: Message = { id, parent, role: m.role === "user" ? "user" : "assistant", text: text(m.text), time: number(m.time) ?? 0 };
  for (const name of ["thought", "model", "finish"] as const) if (text(m[name])) out[name] = text(m[name]);
  if (number(m.changes)) out.changes = m.changes;
  if (m.numbers && typeof m.numbers === "object") {
    const names = ["prompt", "cached", "answer", "first", "speed", "seconds"] as const;
    out.numbers = Object.fromEntries(names.map((n) => [n, number(m.numbers![n])]).filter(([, v]) => v !== undefined));
  }
  const kind = KINDS.find((k) => k === m.trouble?.kind);
  if (kind) out.trouble = { kind, text: text(m.trouble!.text), until: number(m.trouble!.until) };
  return out;
}

/** A conversation read from a file or from storage, with nothing in it that the page does not know; ``null`` if it is none. */
export function checked(value: unknown): Conversation | null {
  const c = value as Partial<Conversation> | null;
  if (!c || typeof c !== "object" || !isId(c.id) || !Array.isArray(c.order) || typeof c.messages !== "object" || !c.messages) return null;
  const messages: Record<string, Message> = {};
  const order: string[] = [];
  for (const id of c.order as unknown[]) {
    if (!isId(id) || Object.hasOwn(messages, id) || !Object.hasOwn(c.messages, id)) continue;
    const m = c.messages[id] as Partial<Message> | null;
    if (!m || (m.role !== "user" && m.role !== "assistant")) continue;
    const parent = isId(m.parent) ? m.parent : null;
    if (parent !== null && !Object.hasOwn(messages, parent)) continue; // parents come first, so there is no circle
    messages[id] = checkedMessage(id, m, parent);
    order.push(id);
  }
  const chosen = Object.fromEntries(Object.entries(c.chosen ?? {}).filter(([k, v]) => (k === ROOT || isId(k)) && isId(v)));
  const [created, updated] = [number(c.created) ?? 0, number(c.updated) ?? 0];
  return { id: c.id, title: text(c.title), named: c.named === true, system: text(c.system), created, updated, messages, order, chosen };
}
