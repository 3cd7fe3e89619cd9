// Where the question is written: Enter sends, Shift+Enter makes a line, Escape stops the answer.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Cell, useCell } from "../../src/cell";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { stopShown, submit } from "./acts";
import { running } from "./answer";
import { shown } from "./library";
import { grow } from "./message";
import { useModel } from "./model";
import { path } from "./tree";

/** What was written and not sent, by conversation: another one can be looked at in between. */
const drafts = new Map<string, string>();
/** Text that a button of the page puts into the field. */
export const proposed = new Cell("");

export function Composer({ id, onEditLast }: { id: string; onEditLast: () => void }) {
  const field = useRef<HTMLTextAreaElement>(null);
  const all = useCell(running);
  const { mode } = useModel();
  const [text, setText] = useState(drafts.get(id) ?? "");
  const busy = path(shown()).some((m) => all.has(m.id));
  useEffect(() => {
    // Not in a conversation that is only looked at, where keys walk on; nor on a phone, where it opens the keyboard.
    if (!shown().order.length && matchMedia("(hover: hover)").matches) field.current!.focus();
  }, []);
  useLayoutEffect(() => proposed.watch(() => {
    setText(proposed.value);
    field.current!.focus();
  }), []);
  useEffect(() => {
    drafts.set(id, text);
    grow(field.current!, Math.min(320, innerHeight * 0.4));
  }, [text]);
  const send = () => {
    if (!text.trim() || busy) return;
    submit(mode === "text" ? text : text.trim());
    setText("");
  };
  const key = (e: KeyboardEvent) => {
    if (e.isComposing || e.keyCode === 229) return; // Enter ends a word of an input method
    if (e.key === "Enter" && !e.shiftKey && !e.altKey) send();
    else if (e.key === "Escape" && busy) stopShown();
    else if (e.key === "ArrowUp" && !text) onEditLast();
    else return;
    e.preventDefault();
  };
  return (
    <form class="composer" onSubmit={(e) => { e.preventDefault(); send(); }}>
      <div class="composer-box">
        <textarea ref={field} id="composer" rows={1} value={text} placeholder={t(mode === "text" ? "The beginning of a text, for the model to continue" : "Ask something")} aria-label={t("Your message")} onInput={(e) => setText(e.currentTarget.value)} onKeyDown={key} />
        {busy ? (
          <button type="button" class="send stop" onClick={() => { stopShown(); field.current!.focus(); }} aria-label={t("Stop the answer")} title={t("Stop (Esc)")}><Icon name="stop" /></button>
        ) : (
          <button type="submit" class="send" disabled={!text.trim()} aria-label={t("Send")} title={t("Send (Enter)")}><Icon name="send" /></button>
        )}
      </div>
    </form>
  );
}
