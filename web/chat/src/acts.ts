// What the reader can do in a conversation. Each act changes the tree first, so that the page shows it at once, and then asks.

import { Cell } from "../../src/cell";
import { ask, running, stopAnswer } from "./answer";
import { get, shown, update } from "./library";
import { settings } from "./settings";
import { add, children, type Message, newId, path } from "./tree";

const message = (role: Message["role"], parent: string | null, text = ""): Message => ({ id: newId(), parent, role, text, time: Date.now() });

/** Messages that are shown as tokens. */
export const opened = new Cell<ReadonlySet<string>>(new Set());
export function open(id: string, on: boolean): void {
  const next = new Set(opened.value);
  if (on) next.add(id);
  else next.delete(id);
  opened.value = next;
}

function answerTo(conversation: string, parent: string): string {
  const next = message("assistant", parent);
  update(conversation, (c) => add(c, { ...next, model: settings.value.model }));
  void ask(conversation, next.id);
  return next.id;
}

export function submit(text: string): void {
  const c = shown();
  const said = path(c);
  const next = message("user", said.length ? said[said.length - 1].id : null, text);
  update(c.id, (now) => add(now, next));
  answerTo(c.id, next.id);
}

/** Another answer beside this one. */
export function again(conversation: string, id: string): string {
  const before = get(conversation)?.messages[id];
  if (!before?.parent) return "";
  stopAnswer(id);
  return answerTo(conversation, before.parent);
}

/** The question in other words: a branch beside it; what followed stays with the old one. */
export function reword(conversation: string, id: string, text: string): void {
  const before = get(conversation)?.messages[id];
  if (!before) return;
  const next = message("user", before.parent, text);
  update(conversation, (c) => add(c, next));
  answerTo(conversation, next.id);
}

export const onward = (conversation: string, id: string) => void ask(conversation, id, true);
export const retry = (conversation: string, id: string) => void ask(conversation, id);

/** Whatever streams in the conversation that is shown. */
export function stopShown(): boolean {
  const ids = path(shown()).map((m) => m.id).filter((id) => running.value.has(id));
  ids.forEach(stopAnswer);
  return ids.length > 0;
}

export const siblings = (conversation: string, m: Message) => children(get(conversation)!, m.parent);
