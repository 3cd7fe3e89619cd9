// An answer that failed: why, and the one thing to do about it.

import { useEffect, useState } from "preact/hooks";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { again, onward, retry } from "./acts";
import { waiting } from "./answer";
import { keyWanted, ready, type Trouble } from "./api";
import { loadModels, modeNow } from "./model";
import { set } from "./settings";
import type { Conversation, Message } from "./tree";

const HEADS: Record<Trouble, string> = {
  key: "The server wants an API key.",
  busy: "The server is busy.",
  starting: "The server is not ready.",
  lost: "The connection ended before the answer did.",
  unreached: "The server cannot be reached.",
  refused: "The server refused the request.",
  server: "The server failed.",
};
const POLL = 1500; // ms

export function Notice({ c, m }: { c: Conversation; m: Message }) {
  const { kind, text, until } = m.trouble!;
  const redo = () => (m.text ? again(c.id, m.id) : retry(c.id, m.id));
  const goesOn = Boolean(m.text) && kind !== "refused" && kind !== "key"; // what has come is not thrown away
  const goOn = () => (goesOn ? onward(c.id, m.id) : redo());
  const templateless = kind === "refused" && /chat template/i.test(text) && modeNow() === "chat";
  return (
    <div class={`notice ${kind}`} role="alert">
      <Icon name={kind === "busy" || kind === "starting" ? "pause" : "warn"} />
      <div>
        <b>{t(HEADS[kind])}</b>
        {text && <p>{text}</p>}
        {templateless && <p>{t("This model has no chat template. It can continue a text: what you write is its beginning.")}</p>}
      </div>
      <div class="notice-acts">
        {goesOn && kind !== "busy" && kind !== "starting" && <button type="button" class="button primary" onClick={() => onward(c.id, m.id)}><Icon name="play" size={13} />{t("Continue")}</button>}
        {kind === "key" && <button type="button" class="button primary" onClick={() => (keyWanted.value = { why: text, again: () => retry(c.id, m.id) })}><Icon name="key" size={14} />{t("Enter a key")}</button>}
        {kind === "busy" && <Countdown until={until ?? 0} onRetry={goOn} />}
        {kind === "starting" && <UntilReady id={m.id} onReady={goOn} />}
        {templateless && <button type="button" class="button primary" onClick={() => { set({ mode: "text" }); redo(); }}>{t("Continue the text")}</button>}
        {kind !== "busy" && kind !== "starting" && kind !== "key" && <button type="button" class={m.text || templateless ? "button" : "button primary"} onClick={redo}><Icon name="replay" size={13} />{t(m.text ? "Answer again" : "Try again")}</button>}
      </div>
    </div>
  );
}

function Countdown({ until, onRetry }: { until: number; onRetry: () => void }) {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), 250);
    return () => clearInterval(timer);
  }, []);
  const left = Math.ceil((until - now) / 1000);
  return (
    <button type="button" class={left > 0 ? "button" : "button primary"} disabled={left > 0} onClick={onRetry}>
      <Icon name="replay" size={13} />{left > 0 ? t("Try again in {n} s", { n: left }) : t("Try again")}
    </button>
  );
}

/** Asks /ready until it is, then asks the question again; after a reload only when told to. */
function UntilReady({ id, onReady }: { id: string; onReady: () => void }) {
  const [on, setOn] = useState(waiting.has(id));
  const [why, setWhy] = useState("");
  useEffect(() => {
    if (!on) return;
    let timer = 0;
    const look = async () => {
      const state = await ready();
      if (timer < 0) return;
      setWhy(state.why);
      if (state.ready) {
        void loadModels();
        onReady();
      } else timer = window.setTimeout(look, POLL);
    };
    timer = window.setTimeout(look, 300);
    return () => {
      clearTimeout(timer);
      timer = -1;
    };
  }, [on]);
  if (!on) return <button type="button" class="button primary" onClick={onReady}><Icon name="replay" size={13} />{t("Try again")}</button>;
  return (
    <>
      <span class="status"><span class="loading small" /> {t("The question is sent when it is ready.")} {why && <small>{why}</small>}</span>
      <button type="button" class="button" onClick={() => { waiting.delete(id); setOn(false); }}>{t("Do not wait")}</button>
    </>
  );
}
