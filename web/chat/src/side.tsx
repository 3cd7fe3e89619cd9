// The conversations: find, open, rename, delete, and move between browsers as a file.

import { useRef, useState } from "preact/hooks";
import { useCell } from "../../src/cell";
import { Dialog } from "../../src/dialog";
import { ago } from "../../src/format";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { running, stopAnswer } from "./answer";
import { say } from "./announce";
import { current, exported, full, imported, library, remove, sorted, start, update } from "./library";
import { usePart } from "./select";
import type { Conversation } from "./tree";

export function Side({ onChosen }: { onChosen: () => void }) {
  const all = sorted(useCell(library));
  const at = useCell(current);
  const isFull = useCell(full);
  const [words, setWords] = useState("");
  const [renaming, setRenaming] = useState("");
  const [deleting, setDeleting] = useState<Conversation | null>(null);
  const [came, setCame] = useState("");
  const file = useRef<HTMLInputElement>(null);
  const found = words ? all.filter((c) => matches(c, words.toLowerCase())) : all;
  const take = async () => {
    const [one] = file.current!.files ?? [];
    if (!one) return;
    const n = imported(await one.text());
    const text = n < 0 ? t("{file} is no export of this page", { file: one.name }) : t("{n} conversations came in", { n });
    file.current!.value = "";
    setCame(text);
    say(text);
  };
  return (
    <nav class="side-in" aria-label={t("Conversations")}>
      <button type="button" class="button new" onClick={() => { start(); onChosen(); }}><Icon name="plus" size={15} />{t("New chat")}<kbd>n</kbd></button>
      {all.length > 4 && <input type="search" id="search" value={words} placeholder={t("Search")} aria-label={t("Search conversations")} onInput={(e) => setWords(e.currentTarget.value)} />}
      {isFull && <p class="failed" role="alert">{t("The browser keeps no more: export conversations and delete some, or the newest words are lost with the page.")}</p>}
      <ul class="chats">
        {found.map((c) => (
          <li key={c.id} class={c.id === at ? "chat on" : "chat"}>
            {renaming === c.id ? <Rename c={c} onDone={() => setRenaming("")} /> : (
              <>
                <button type="button" class="chat-open" aria-current={c.id === at ? "true" : undefined} onClick={() => { current.value = c.id; onChosen(); }} onDblClick={() => setRenaming(c.id)}>
                  <span>{c.title || t("Untitled")}</span><small><Busy c={c} />{ago(c.updated / 1000)}</small>
                </button>
                <span class="chat-acts">
                  <button type="button" class="icon-button" onClick={() => setRenaming(c.id)} aria-label={t("Rename {title}", { title: c.title })} title={t("Rename")}><Icon name="edit" size={14} /></button>
                  <button type="button" class="icon-button" onClick={() => save([c], c.title)} aria-label={t("Export {title}", { title: c.title })} title={t("Export")}><Icon name="download" size={14} /></button>
                  <button type="button" class="icon-button" onClick={() => setDeleting(c)} aria-label={t("Delete {title}", { title: c.title })} title={t("Delete")}><Icon name="trash" size={14} /></button>
                </span>
              </>
            )}
          </li>
        ))}
      </ul>
      {!found.length && <p class="note side-empty">{t(words ? "No conversation has these words." : "Conversations stay in this browser.")}</p>}
      <footer>
        {came && <p class="note">{came}</p>}
        <button type="button" class="text-button" disabled={!all.length} onClick={() => save(all, "chats")}><Icon name="download" size={14} />{t("Export all")}</button>
        <button type="button" class="text-button" onClick={() => file.current!.click()}><Icon name="upload" size={14} />{t("Import")}</button>
        <input ref={file} type="file" accept="application/json,.json" hidden onChange={take} aria-label={t("Import")} />
      </footer>
      {deleting && <Delete c={deleting} onDone={() => setDeleting(null)} />}
    </nav>
  );
}

function matches(c: Conversation, words: string): boolean {
  return c.title.toLowerCase().includes(words) || c.order.some((id) => c.messages[id].text.toLowerCase().includes(words));
}

function Busy({ c }: { c: Conversation }) {
  const busy = usePart(running, (all) => [...all.values()].some((r) => r.conversation === c.id));
  return busy ? <><span class="loading small" role="img" aria-label={t("answering")} /> </> : null;
}

function Rename({ c, onDone }: { c: Conversation; onDone: () => void }) {
  const done = (text: string) => {
    if (text.trim()) update(c.id, (now) => ({ ...now, title: text.trim(), named: true }));
    onDone();
  };
  const key = (e: KeyboardEvent & { currentTarget: HTMLInputElement }) => {
    if (e.key === "Enter" && !e.isComposing) done(e.currentTarget.value);
    else if (e.key === "Escape") onDone();
    else return;
    e.preventDefault();
    e.stopPropagation();
  };
  return <input class="rename" type="text" defaultValue={c.title} maxLength={200} aria-label={t("New name")} ref={(e) => { if (e && document.activeElement !== e) e.focus(); }} onKeyDown={key} onBlur={(e) => done(e.currentTarget.value)} />;
}

function Delete({ c, onDone }: { c: Conversation; onDone: () => void }) {
  const go = () => {
    for (const id of c.order) stopAnswer(id);
    remove(c.id);
    onDone();
  };
  return (
    <Dialog title={t("Delete this conversation?")} onClose={onDone}>
      <p>{t("“{title}” has {n} messages. It is only in this browser, and cannot be brought back.", { title: c.title || t("Untitled"), n: c.order.length })}</p>
      <footer>
        <button type="button" class="button" onClick={onDone}>{t("Keep it")}</button>
        <button type="button" class="button danger solid" onClick={go}>{t("Delete")}</button>
      </footer>
    </Dialog>
  );
}

/** Hand a file to the browser. */
function save(which: Conversation[], name: string): void {
  const address = URL.createObjectURL(new Blob([exported(which)], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "chat"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
