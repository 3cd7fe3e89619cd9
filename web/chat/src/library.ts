// All conversations: one entry of localStorage each, so that two tabs do not overwrite each other's.

import { Cell } from "../../src/cell";
import { type Conversation, checked, conversation, newId, upTo } from "./tree";

const PREFIX = "deepseek.chat.c.";
const FORMAT = "deepseek-chat-1";

function read(): Map<string, Conversation> {
  const found = new Map<string, Conversation>();
  try {
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i) ?? "";
      const one = key.startsWith(PREFIX) ? parsed(localStorage.getItem(key)) : null;
      if (one) found.set(one.id, one);
    }
  } catch {
    // storage is closed to the page: conversations live until it is closed
  }
  return found;
}

function parsed(text: string | null): Conversation | null {
  try {
    return checked(JSON.parse(text ?? "null"));
  } catch {
    return null;
  }
}

export const library = new Cell<ReadonlyMap<string, Conversation>>(read());
export const current = new Cell<string>("");
const CURRENT = "deepseek.chat.current"; // in this tab: a reload comes back to where the reader was
current.watch(() => {
  try {
    sessionStorage.setItem(CURRENT, current.value);
  } catch {
    // as above
  }
});
/** Messages that this page is receiving: another tab's version of their conversation may not have them yet. */
export const receiving = new Set<string>();
/** Set when the browser keeps no more: the words for the reader. */
export const full = new Cell(false);

/** The newest first. */
export function sorted(all: ReadonlyMap<string, Conversation>): Conversation[] {
  return [...all.values()].sort((a, b) => b.updated - a.updated);
}

const blank = new Cell<Conversation>(conversation());

/** The conversation that is shown; a new one is kept only once something was said in it. */
export const shown = (): Conversation => library.value.get(current.value) ?? blank.value;

export function watchShown(watcher: () => void): () => void {
  const ends = [library.watch(watcher), current.watch(watcher), blank.watch(watcher)];
  return () => ends.forEach((end) => end());
}

export function start(system = ""): void {
  blank.value = conversation(system);
  current.value = blank.value.id;
}

/** The conversation that this tab showed before it was loaded again, or a new one. */
export function resume(): void {
  let id = "";
  try {
    id = sessionStorage.getItem(CURRENT) ?? "";
  } catch {
    // as above
  }
  if (library.value.has(id)) current.value = id;
  else start();
}

export function get(id: string): Conversation | undefined {
  return library.value.get(id) ?? (blank.value.id === id ? blank.value : undefined);
}

/** Change a conversation by its id; whoever looks at it sees the change, and storage has it unless ``keep`` is false. */
export function update(id: string, how: (c: Conversation) => Conversation, keep = true): void {
  const before = get(id);
  if (!before) return;
  const after = how(before);
  if (after === before) return;
  if (!after.order.length && !library.value.has(id)) blank.value = after;
  else {
    library.value = new Map(library.value).set(id, after);
    if (keep) write(after);
  }
}

export function remove(id: string): void {
  const next = new Map(library.value);
  next.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // as above
  }
  if (current.value === id) start();
  library.value = next;
  full.value = false;
}

function write(c: Conversation): void {
  try {
    localStorage.setItem(PREFIX + c.id, JSON.stringify(c));
    full.value = false;
  } catch {
    full.value = true;
  }
}

addEventListener("storage", (e) => {
  if (!e.key?.startsWith(PREFIX)) return;
  const next = new Map(library.value);
  const one = parsed(e.newValue);
  if (one) next.set(one.id, withReceiving(one, next.get(one.id)));
  else next.delete(e.key.slice(PREFIX.length));
  library.value = next;
});

/** ``theirs``, and of ``mine`` what this page is receiving, with the messages that lead to it. */
function withReceiving(theirs: Conversation, mine: Conversation | undefined): Conversation {
  let kept = theirs;
  for (const id of mine?.order ?? []) {
    if (!receiving.has(id)) continue;
    const missing = upTo(mine!, id).filter((m) => !Object.hasOwn(kept.messages, m.id) || m.id === id);
    const added = missing.filter((m) => !Object.hasOwn(kept.messages, m.id)).map((m) => m.id);
    kept = { ...kept, messages: { ...kept.messages, ...Object.fromEntries(missing.map((m) => [m.id, m])) }, order: [...kept.order, ...added] };
  }
  return kept;
}

export function exported(which: Conversation[]): string {
  return JSON.stringify({ format: FORMAT, conversations: which }, null, 1);
}

/** Take in what ``exported`` gave; a known id comes in as a copy. How many came in, or -1 for a file of another kind. */
export function imported(text: string): number {
  let found: unknown[];
  try {
    const file = JSON.parse(text) as { format?: string; conversations?: unknown[] };
    if (file.format !== FORMAT || !Array.isArray(file.conversations)) return -1;
    found = file.conversations;
  } catch {
    return -1;
  }
  const next = new Map(library.value);
  let count = 0;
  for (const each of found) {
    const one = checked(each);
    if (!one) continue;
    const kept = next.has(one.id) ? { ...one, id: newId() } : one;
    next.set(kept.id, kept);
    write(kept);
    count++;
  }
  library.value = next;
  return count;
}
