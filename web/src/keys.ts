// Single keys that do something; never while a text is being typed or a dialog is open.

import { useLayoutEffect, useRef } from "preact/hooks";

export type Keys = Record<string, () => void>;

/** Listen while the component is on the page; the acts are always those of its newest drawing. */
export function useKeys(keys: Keys): void {
  const newest = useRef(keys);
  newest.current = keys;
  useLayoutEffect(() => {
    const listen = (e: KeyboardEvent) => {
      if (e.ctrlKey || e.metaKey || e.altKey || e.defaultPrevented || typing(e.target) || document.querySelector("dialog[open]")) return;
      const act = newest.current[e.key];
      if (!act) return;
      e.preventDefault();
      act();
    };
    addEventListener("keydown", listen);
    return () => removeEventListener("keydown", listen);
  }, []);
}

function typing(target: EventTarget | null): boolean {
  const element = target as HTMLElement | null;
  return Boolean(element?.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]"));
}
