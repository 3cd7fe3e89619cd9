// Single keys that do something; never while a text is being typed or a dialog is open.

export type Keys = Record<string, () => void>;

export function onKey(keys: Keys): () => void {
  const listen = (e: KeyboardEvent) => {
    if (e.ctrlKey || e.metaKey || e.altKey || typing(e.target) || document.querySelector("dialog[open]")) return;
    const act = keys[e.key];
    if (!act) return;
    e.preventDefault();
    act();
  };
  addEventListener("keydown", listen);
  return () => removeEventListener("keydown", listen);
}

function typing(target: EventTarget | null): boolean {
  const element = target as HTMLElement | null;
  return Boolean(element?.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]"));
}
