// All conversations: one entry of localStorage each, so that two tabs do not overwrite each other's.

import { Cell } from "../../src/cell";
import { type Conversation, checked, conversation, lacks, merge, newId } from "./tree";

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
/** Messages that this page is receiving: they are written every now and then, and at their end. */
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

/** Change a conversation by its id; whoever looks at it sees the change, and so does storage. */
export function update(id: string, how: (c: Conversation) => Conversation): void {
  const before = get(id);
  if (!before) return;
  const after = how(before);
  if (after === before) return;
  if (!after.order.length && !library.value.has(id)) blank.value = after;
  else {
    const there = stored(id); // what another tab wrote a moment ago, or while this page was asleep
    const whole = there && lacks(after, there, receiving) ? merge(after, there) : after;
    library.value = new Map(library.value).set(id, whole);
    write(whole);
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

function stored(id: string): Conversation | null {
  try {
    return parsed(localStorage.getItem(PREFIX + id));
  } catch {
    return null;
  }
}

function write(c: Conversation): void {
  try {
    localStorage.setItem(PREFIX + c.id, JSON.stringify(c));
    full.value = false;
  } catch {
    full.value = true;
  }
}

// Another tab wrote. Each tab writes whole conversations, so that a version may come that knows nothing of what this page
// had just written: what is merged then is written again, until a version comes that lacks nothing.
addEventListener("storage", (e) => {
  if (!e.key?.startsWith(PREFIX)) return;
  const id = e.key.slice(PREFIX.length);
  const [theirs, mine, there] = [parsed(e.newValue), library.value.get(id), stored(id)];
  const next = new Map(library.value);
  if (theirs && there) {
    const whole = mine ? merge(theirs, mine) : theirs;
    next.set(id, whole);
    if (lacks(there, whole, receiving)) write(whole);
  } else {
    next.delete(id);
    // what this page received in the meantime does not bring back what was deleted
    if (there && mine?.order.some((m) => receiving.has(m))) localStorage.removeItem(e.key);
  }
  library.value = next;
});

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
