// Every series of a run: searched by words, in groups, with unit, meaning and last value. `*` and `{a,b}` work too.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { SeriesInfo } from "./api";
import { Dialog } from "./dialog";
import { measured } from "./format";
import { said, t, word } from "./text";

const SHOWN = 400;

export function matches(series: SeriesInfo, words: string[]): boolean {
  const text = `${series.name} ${series.group} ${series.unit} ${series.description?.en ?? ""} ${series.description?.zh ?? ""}`.toLowerCase();
  return words.every((word) => (word.includes("*") ? glob(word).test(series.name.toLowerCase()) : text.includes(word)));
}

function glob(pattern: string): RegExp {
  return new RegExp(`^${pattern.replace(/[.+^${}()|[\]\\?]/g, "\\$&").replace(/\*/g, ".*")}$`);
}

/** Names by their numbers too: layer/2 before layer/10. */
export const byName = (a: { name: string }, b: { name: string }) => a.name.localeCompare(b.name, "en", { numeric: true });

export function Picker({ series, chosen, most = 24, title, onDone, onClose }: {
  series: SeriesInfo[];
  chosen: string[];
  most?: number;
  title: string;
  onDone: (names: string[]) => void;
  onClose: () => void;
}) {
  const [text, setText] = useState("");
  const [picked, setPicked] = useState<string[]>(chosen);
  const input = useRef<HTMLInputElement>(null);
  useEffect(() => input.current?.focus(), []);
  const found = useMemo(() => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    return series.filter((s) => matches(s, words)).sort(byName);
  }, [series, text]);
  const groups = useMemo(() => {
    const out = new Map<string, SeriesInfo[]>();
    for (const s of found.slice(0, SHOWN)) out.set(s.group, [...(out.get(s.group) ?? []), s]);
    return [...out];
  }, [found]);
  const flip = (name: string) => setPicked((p) => (p.includes(name) ? p.filter((n) => n !== name) : [...p, name].slice(-most)));
  return (
    <Dialog title={title} onClose={onClose} wide>
      <div class="picker-top">
        <input
          ref={input}
          type="search"
          value={text}
          placeholder={t("Search {n} series, or layer/*/grad_norm", { n: series.length })}
          aria-label={t("Search series")}
          onInput={(e) => setText((e.target as HTMLInputElement).value)}
          onKeyDown={(e) => {
            if (e.key === "Enter" && found.length) onDone(picked.length ? picked : found.slice(0, most).map((s) => s.name));
          }}
        />
        <button type="button" class="button" disabled={!found.length} onClick={() => setPicked([...new Set([...picked, ...found.slice(0, most).map((s) => s.name)])].slice(-most))}>
          {t("Take all {n}", { n: Math.min(found.length, most) })}
        </button>
      </div>
      <div class="picker-list" tabIndex={0} role="group" aria-label={t("Series")}>
        {groups.map(([group, items]) => (
          <section key={group}>
            <h3>{word(group)} <small>{items.length}</small></h3>
            {items.map((s) => (
              <label key={s.name} class="pick">
                <input type="checkbox" checked={picked.includes(s.name)} onChange={() => flip(s.name)} />
                <span class="pick-name">{s.name}</span>
                <span class="pick-about">{said(s.description)}</span>
                <span class="pick-last">{measured(s.last, s.unit)} {s.unit && <small>{s.unit}</small>}</span>
              </label>
            ))}
          </section>
        ))}
        {found.length > SHOWN && <p class="note">{t("{n} more: narrow the search.", { n: found.length - SHOWN })}</p>}
        {!found.length && <p class="empty">{t("No series matches.")}</p>}
      </div>
      <footer>
        <span class="note">{picked.length ? t("{n} chosen", { n: picked.length }) : t("Choose up to {n}; they share one chart.", { n: most })}</span>
        <button type="button" class="button" onClick={() => setPicked([])} disabled={!picked.length}>{t("Clear")}</button>
        <button type="button" class="button primary" onClick={() => onDone(picked)} disabled={!picked.length}>{t("Show")}</button>
      </footer>
    </Dialog>
  );
}
