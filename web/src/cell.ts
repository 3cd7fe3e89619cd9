// A value that components watch: the smallest store that serves a page of this size.

import { useLayoutEffect, useReducer } from "preact/hooks";

export class Cell<T> {
  private watchers = new Set<() => void>();
  constructor(private current: T) {}
  get value(): T {
    return this.current;
  }
  set value(next: T) {
    if (Object.is(next, this.current)) return;
    this.current = next;
    for (const watcher of [...this.watchers]) watcher();
  }
  watch(watcher: () => void): () => void {
    this.watchers.add(watcher);
    return () => void this.watchers.delete(watcher);
  }
}

/** Listens from its drawing on: an effect comes after the next frame, and would miss what changes before. */
export function useCell<T>(cell: Cell<T>): T {
  const [, redraw] = useReducer((n: number) => n + 1, 0);
  useLayoutEffect(() => cell.watch(() => redraw(undefined as never)), [cell]);
  return cell.value;
}

export function remembered(key: string, fallback: string): string {
  try {
    return localStorage.getItem(`deepseek.${key}`) ?? fallback;
  } catch {
    return fallback; // storage may be closed to the page; it then simply forgets
  }
}

export function remember(key: string, value: string): void {
  try {
    localStorage.setItem(`deepseek.${key}`, value);
  } catch {
    // as above
  }
}
