// One message of the conversation, and what can be done with it.

import { useEffect, useRef, useState } from "preact/hooks";
import { useCell } from "../../src/cell";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { again, onward, open, opened, retry, reword, siblings } from "./acts";
import { details, FORGOTTEN, type Live, OPEN, parted, running } from "./answer";
import { Reading } from "./announce";
import { CopyButton } from "./copy";
import { Markdown } from "./prose";
import { Figures } from "./numbers";
import { Notice } from "./notice";
import { Tokens } from "./tokens";
import { get, update } from "./library";
import { usePart } from "./select";
import { set, settings } from "./settings";
import { type Conversation, type Message, turn } from "./tree";

/** Which message is being reworded: one at a time, and also by keys. */
export function UserMessage({ c, m, editing, onEdit }: { c: Conversation; m: Message; editing: boolean; onEdit: (on: boolean) => void }) {
  if (editing) return <Reword c={c} m={m} onDone={() => onEdit(false)} />;
  return (
    <article class="message user" aria-label={t("You")} data-id={m.id}>
      <div class="bubble">{m.text}</div>
      <div class="acts">
        <Branches c={c} m={m} />
        <CopyButton text={m.text} label={t("Copy")} />
        <button type="button" class="icon-button act" onClick={() => onEdit(true)} aria-label={t("Edit")} title={t("Edit: ask in other words")}><Icon name="edit" size={15} /></button>
      </div>
    </article>
  );
}

function Reword({ c, m, onDone }: { c: Conversation; m: Message; onDone: () => void }) {
  const field = useRef<HTMLTextAreaElement>(null);
  const [text, setText] = useState(m.text);
  useEffect(() => {
    field.current!.focus();
    field.current!.setSelectionRange(text.length, text.length);
  }, []);
  useEffect(() => grow(field.current!, 400), [text]);
  const send = () => {
    if (!text.trim()) return;
    onDone();
    reword(c.id, m.id, text.trim());
    document.getElementById("composer")?.focus();
  };
  const key = (e: KeyboardEvent) => {
    if (e.key === "Escape") onDone();
    else if (e.key === "Enter" && !e.shiftKey && !e.isComposing) send();
    else return;
    e.preventDefault();
    e.stopPropagation();
  };
  return (
    <form class="message user reword" onSubmit={(e) => { e.preventDefault(); send(); }}>
      <textarea ref={field} value={text} aria-label={t("The question in other words")} onInput={(e) => setText(e.currentTarget.value)} onKeyDown={key} rows={1} />
      <div class="acts">
        <span class="note">{t("Both wordings are kept: ‹ › switches between them.")}</span>
        <button type="button" class="button" onClick={onDone}>{t("Cancel")}</button>
        <button type="submit" class="button primary" disabled={!text.trim()}>{t("Send")}</button>
      </div>
    </form>
  );
}

/** A field as tall as its text, up to ``most`` px. */
export function grow(field: HTMLTextAreaElement, most: number): void {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, most)}px`;
}

export function AssistantMessage({ c, m }: { c: Conversation; m: Message }) {
  const run = usePart(running, (all) => all.get(m.id));
  return run ? <Streaming c={c} m={m} cell={run.cell} /> : <Answer c={c} m={m} live={null} />;
}

function Streaming({ c, m, cell }: { c: Conversation; m: Message; cell: import("../../src/cell").Cell<Live> }) {
  const live = useCell(cell);
  const reading = useRef(new Reading());
  reading.current.follow(live.text);
  useEffect(() => () => {
    // Gone because the answer ended, or because another conversation is shown: then nothing is read out.
    if (!running.value.has(m.id)) reading.current.end(get(c.id)?.messages[m.id]?.text ?? "", t("End of the answer."));
  }, []);
  return <Answer c={c} m={m} live={live} />;
}

function Answer({ c, m, live }: { c: Conversation; m: Message; live: Live | null }) {
  const tokens = usePart(opened, (all) => all.has(m.id));
  const kept = usePart(details, (all) => all.get(m.id));
  const known = live?.details.length ? live.details : kept;
  const found = parted(live?.text ?? m.text);
  const { text } = found;
  const thought = live?.thought || m.thought || found.thought;
  const waits = live !== null && !live.text && !live.thought;
  return (
    <article class="message assistant" aria-label={t("Answer of {model}", { model: m.model ?? t("the model") })} aria-busy={live !== null} data-id={m.id}>
      {thought && <details class="thought" open={live !== null && !text}><summary>{t("Thoughts")}</summary><Markdown text={thought} /></details>}
      {waits ? <p class="waits"><span class="dots" aria-hidden="true"><i /><i /><i /></span><span class="sr">{t("The model reads the question")}</span></p> : tokens && known?.length ? <Tokens all={known} /> : <Markdown text={text} />}
      {tokens && !known?.length && !live && <NoTokens c={c} m={m} />}
      {m.trouble && !live && <Notice c={c} m={m} />}
      {!m.trouble && !live && m.finish === OPEN && <Unended c={c} m={m} />}
      {!m.trouble && !live && m.finish && m.finish !== "stop" && m.finish !== OPEN && <Ended c={c} m={m} />}
      <div class="acts">
        <Branches c={c} m={m} />
        {!live && <>
          <CopyButton text={() => m.text} label={t("Copy")} />
          <button type="button" class="icon-button act" onClick={() => again(c.id, m.id)} aria-label={t("Answer again")} title={t("Answer again (r)")}><Icon name="replay" size={15} /></button>
        </>}
        <button type="button" class="text-button act" aria-pressed={tokens} onClick={() => open(m.id, !tokens)} title={t("Experts, branches and probabilities of each token")}><Icon name="chips" size={15} />{t("Tokens")}</button>
        <Figures numbers={live?.numbers ?? m.numbers} live={live !== null} model={m.model} />
      </div>
    </article>
  );
}

function Ended({ c, m }: { c: Conversation; m: Message }) {
  const why = { length: "The answer reached its longest length.", abort: "Stopped.", timeout: "The server's time for one answer ran out.", tool_calls: "The model asks for a tool, which this page cannot run." }[m.finish!];
  return (
    <p class="ended">
      <span>{why ? t(why) : t("Ended: {why}", { why: m.finish! })}</span>
      {m.text && m.finish !== "tool_calls" && <button type="button" class="button" onClick={() => onward(c.id, m.id)}><Icon name="play" size={13} />{t("Continue")}</button>}
    </p>
  );
}

/** An answer whose end nobody kept: another tab receives it now, or the browser was ended in the middle. */
function Unended({ c, m }: { c: Conversation; m: Message }) {
  const left = () => c.updated + FORGOTTEN - Date.now();
  const [fresh, setFresh] = useState(left() > 0);
  useEffect(() => {
    setFresh(left() > 0);
    const timer = setTimeout(() => setFresh(false), Math.max(0, left()));
    return () => clearTimeout(timer);
  }, [c.updated]);
  if (fresh) return <p class="ended"><span class="status"><span class="loading small" /> {t("Another tab receives this answer.")}</span></p>;
  return (
    <p class="ended">
      <span>{t("The page was closed before the answer ended.")}</span>
      {m.text && <button type="button" class="button" onClick={() => onward(c.id, m.id)}><Icon name="play" size={13} />{t("Continue")}</button>}
      {!m.text && <button type="button" class="button" onClick={() => retry(c.id, m.id)}><Icon name="replay" size={13} />{t("Try again")}</button>}
    </p>
  );
}

function NoTokens({ c, m }: { c: Conversation; m: Message }) {
  const ask = () => {
    set({ trace: true, logprobs: true });
    open(again(c.id, m.id), true);
  };
  const on = useCell(settings);
  return (
    <div class="card no-tokens">
      <p>{t(on.trace || on.logprobs ? "This answer came without token details: they are kept until the page is closed, and not every server or model has them." : "Token details were not asked for with this answer.")}</p>
      <button type="button" class="button" onClick={ask}><Icon name="chips" size={14} />{t("Answer again with token details")}</button>
    </div>
  );
}

function Branches({ c, m }: { c: Conversation; m: Message }) {
  const all = siblings(c.id, m);
  if (all.length < 2) return null;
  const at = all.indexOf(m.id);
  const go = (by: number) => {
    update(c.id, (now) => turn(now, m.id, by));
    requestAnimationFrame(() => document.querySelector<HTMLElement>(`[data-id="${all[at + by]}"] .branches button[data-by="${by}"]:not(:disabled), [data-id="${all[at + by]}"] .branches button:not(:disabled)`)?.focus());
  };
  return (
    <span class="branches" role="group" aria-label={t("Version {i} of {n}", { i: at + 1, n: all.length })}>
      <button type="button" class="icon-button act" data-by={-1} disabled={at === 0} onClick={() => go(-1)} aria-label={t("Earlier version")}><Icon name="left" size={13} /></button>
      <span aria-hidden="true">{at + 1}/{all.length}</span>
      <button type="button" class="icon-button act" data-by={1} disabled={at === all.length - 1} onClick={() => go(1)} aria-label={t("Later version")}><Icon name="right" size={13} /></button>
    </span>
  );
}
