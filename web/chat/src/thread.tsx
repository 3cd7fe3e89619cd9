// The conversation, first to last. It follows the answer until the reader scrolls up, and again from the end on.

import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from "preact/hooks";
import { useCell } from "../../src/cell";
import { Icon } from "../../src/icons";
import { t, useLang } from "../../src/text";
import { proposed } from "./composer";
import { shown, update, watchShown } from "./library";
import { AssistantMessage, UserMessage } from "./message";
import { Welcome } from "./welcome";
import { models, useModel } from "./model";
import { type Conversation, type Message, path } from "./tree";

const FIRST = 60; // messages drawn at once; earlier ones when they are scrolled to
const NEAR = 48; // px from the end that still count as at the end

export function useShown(): Conversation {
  const [, redraw] = useReducer((n: number) => n + 1, 0);
  useLayoutEffect(() => watchShown(() => redraw(undefined as never)), []);
  return shown();
}

export function Thread({ editing, onEdit }: { editing: string; onEdit: (id: string) => void }) {
  const c = useShown();
  const all = useMemo(() => path(c), [c]);
  const box = useRef<HTMLElement>(null);
  const inner = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  const [away, setAway] = useState(false);
  const [count, setCount] = useState(FIRST);
  const last = all[all.length - 1]?.id;

  const toEnd = () => {
    follows.current = true;
    setAway(false);
    box.current!.scrollTop = box.current!.scrollHeight;
  };
  useLayoutEffect(() => {
    setCount(FIRST);
    toEnd();
  }, [c.id]);
  useLayoutEffect(toEnd, [last]); // a new message, or another branch
  useEffect(() => {
    const host = box.current!;
    let [top, height] = [host.scrollTop, host.scrollHeight];
    const scrolled = () => {
      const end = host.scrollHeight - host.clientHeight - host.scrollTop < NEAR;
      // Content that shrinks also moves the top up; only a reader moves it without that.
      if (host.scrollTop < top - 1 && host.scrollHeight >= height && !end) follows.current = false;
      else if (end) follows.current = true;
      [top, height] = [host.scrollTop, host.scrollHeight];
      setAway(!follows.current);
    };
    const grown = new ResizeObserver(() => {
      if (follows.current) host.scrollTop = host.scrollHeight;
    });
    host.addEventListener("scroll", scrolled, { passive: true });
    grown.observe(inner.current!);
    grown.observe(host);
    return () => {
      host.removeEventListener("scroll", scrolled);
      grown.disconnect();
    };
  }, []);

  const earlier = Math.max(0, all.length - count);
  const more = () => {
    const host = box.current!;
    const from = host.scrollHeight - host.scrollTop;
    setCount(count + FIRST);
    requestAnimationFrame(() => (host.scrollTop = host.scrollHeight - from));
  };
  return (
    <div class="thread-frame">
      <main id="main" class="thread" ref={box} tabIndex={0} aria-label={t("Conversation")}>
        <div class="thread-in" ref={inner}>
          <System key={c.id} c={c} />
          {!all.length && <Welcome onPick={(text) => (proposed.value = text)} />}
          {earlier > 0 && <button type="button" class="button earlier" onClick={more}>{t("Show {n} earlier messages", { n: Math.min(earlier, FIRST) })}</button>}
          {all.slice(earlier).map((m) => <Row key={m.id} c={c} m={m} editing={editing === m.id} onEdit={onEdit} />)}
        </div>
      </main>
      {away && <button type="button" class="to-end" onClick={toEnd} aria-label={t("To the end")} title={t("To the end")}><Icon name="down" /></button>}
    </div>
  );
}

/** Drawn again only when its own message changed: the rest of a long conversation costs nothing. */
function Row({ c, m, editing, onEdit }: { c: Conversation; m: Message; editing: boolean; onEdit: (id: string) => void }) {
  const siblings = useMemo(() => c.order.filter((id) => c.messages[id].parent === m.parent).length, [c.order, m.parent]);
  const lang = useLang();
  return useMemo(
    () => (m.role === "user" ? <UserMessage c={c} m={m} editing={editing} onEdit={(x) => onEdit(x ? m.id : "")} /> : <AssistantMessage c={c} m={m} />),
    [m, siblings, editing, lang],
  );
}

function System({ c }: { c: Conversation }) {
  const { mode } = useModel();
  const { list } = useCell(models);
  if (!list && !c.system) return null;
  return (
    <details class="system" open={Boolean(c.system) && !c.order.length}>
      <summary><Icon name="flag" size={13} />{t(mode === "text" ? "Before the text" : "System prompt")}<small>{c.system ? c.system.slice(0, 90) : t("none")}</small></summary>
      <textarea value={c.system} rows={3} placeholder={t("How the model should behave in this conversation")} aria-label={t("System prompt")} onInput={(e) => update(c.id, (now) => ({ ...now, system: e.currentTarget.value }))} />
    </details>
  );
}
