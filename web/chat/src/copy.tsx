// Copies a text and says so. Without a secure context (plain http on another machine) there is no clipboard API: then by selection.

import { useState } from "preact/hooks";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { say } from "./announce";

export async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement as HTMLElement | null;
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "sr";
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus();
    return done;
  }
}

export function CopyButton({ text, label, words }: { text: string | (() => string); label: string; words?: string }) {
  const [done, setDone] = useState(false);
  const press = async () => {
    if (!(await copy(typeof text === "string" ? text : text()))) return say(t("The browser does not allow copying"));
    setDone(true);
    say(t("Copied"));
    setTimeout(() => setDone(false), 1600);
  };
  return (
    <button type="button" class={words ? "text-button act" : "icon-button act"} onClick={press} aria-label={label} title={label}>
      <Icon name={done ? "check" : "copy"} size={15} />{words}
    </button>
  );
}
