// The frame: conversations on the left, the talk in the middle, parameters on the right. On a narrow screen the sides are drawers.

import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Cell, remember, remembered, useCell } from "../../src/cell";
import { Dialog } from "../../src/dialog";
import { Icon } from "../../src/icons";
import { useKeys } from "../../src/keys";
import { dark } from "../../src/palette";
import { setLang, t, useLang } from "../../src/text";
import { switchTheme } from "../../src/theme";
import { again, stopShown } from "./acts";
import { announced } from "./announce";
import { keyWanted, setKey } from "./api";
import { Composer } from "./composer";
import { current, library, sorted, start } from "./library";
import { models } from "./model";
import { Parameters } from "./parameters";
import { set, settings } from "./settings";
import { Side } from "./side";
import { Thread, useShown } from "./thread";
import { path } from "./tree";

function media(query: string): Cell<boolean> {
  const list = matchMedia(query);
  const cell = new Cell(list.matches);
  list.addEventListener("change", () => (cell.value = list.matches));
  return cell;
}
const narrow = media("(max-width: 860px)");
const medium = media("(max-width: 1180px)");

export function App() {
  const lang = useLang();
  const c = useShown();
  const isNarrow = useCell(narrow);
  const isMedium = useCell(medium);
  const [side, setSide] = useState(!isNarrow && remembered("chat.side", "1") === "1");
  const [params, setParams] = useState(!isMedium && remembered("chat.params", "0") === "1");
  const [editing, setEditing] = useState("");
  const [help, setHelp] = useState(false);
  const wanted = useCell(keyWanted);
  const showSide = (on: boolean) => { setSide(on); if (!isNarrow) remember("chat.side", on ? "1" : "0"); };
  const showParams = (on: boolean) => { setParams(on); if (!isMedium) remember("chat.params", on ? "1" : "0"); };
  useEffect(() => { if (isNarrow) setSide(false); }, [isNarrow]);
  useEffect(() => { if (isMedium) setParams(false); }, [isMedium]);
  useEffect(() => setEditing(""), [c.id]);
  useEffect(() => void (document.title = c.title ? `${c.title} · deepseek chat` : "deepseek chat"), [c.title]);

  const last = (role: string) => path(c).filter((m) => m.role === role).pop();
  const walk = (by: number) => {
    const all = sorted(library.value);
    const next = all[all.findIndex((x) => x.id === c.id) + by];
    if (next) current.value = next.id;
  };
  useKeys({
    n: () => start(),
    i: () => document.getElementById("composer")?.focus(),
    "/": () => { showSide(true); requestAnimationFrame(() => document.getElementById("search")?.focus()); },
    e: () => setEditing(last("user")?.id ?? ""),
    r: () => { const m = last("assistant"); if (m) again(c.id, m.id); },
    j: () => walk(1),
    k: () => walk(-1),
    s: () => showSide(!side),
    p: () => showParams(!params),
    t: switchTheme,
    l: () => setLang(lang === "en" ? "zh" : "en"),
    "?": () => setHelp(true),
    Escape: () => void stopShown(),
  });
  return (
    <div class="app">
      <a class="skip" href="#composer" onClick={(e) => { e.preventDefault(); document.getElementById("composer")?.focus(); }}>{t("Skip to your message")}</a>
      <Drawer name={t("Conversations")} place="side" open={side} modal={isNarrow} onClose={() => showSide(false)}><Side onChosen={() => { if (isNarrow) setSide(false); }} /></Drawer>
      <div class="middle">
        <Top side={side} params={params} onSide={() => showSide(!side)} onParams={() => showParams(!params)} onHelp={() => setHelp(true)} />
        <Thread editing={editing} onEdit={setEditing} />
        <Composer key={c.id} id={c.id} onEditLast={() => setEditing(last("user")?.id ?? "")} />
      </div>
      <Drawer name={t("Parameters")} place="params" open={params} modal={isMedium} onClose={() => showParams(false)}><Parameters /></Drawer>
      {wanted && <KeyEntry why={wanted.why} onClose={() => (keyWanted.value = null)} onKey={wanted.again} />}
      {help && <Help onClose={() => setHelp(false)} />}
      <Announcer />
    </div>
  );
}

function Announcer() {
  return <div class="sr" role="status" aria-live="polite">{useCell(announced)}</div>;
}

function Drawer({ name, place, open, modal, onClose, children }: { name: string; place: string; open: boolean; modal: boolean; onClose: () => void; children: ComponentChildren }) {
  const host = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    if (open && modal && host.current && !host.current.open) host.current.showModal();
  }, [open, modal]);
  if (!open) return null;
  if (!modal) return <aside class={place} aria-label={name}>{children}</aside>;
  return (
    <dialog ref={host} class={`drawer ${place}`} aria-label={name} onClose={onClose} onClick={(e) => e.target === host.current && onClose()}>
      <header><h2>{name}</h2><button type="button" class="icon-button" onClick={onClose} aria-label={t("Close")}><Icon name="close" /></button></header>
      {children}
    </dialog>
  );
}

function Top({ side, params, onSide, onParams, onHelp }: { side: boolean; params: boolean; onSide: () => void; onParams: () => void; onHelp: () => void }) {
  const isDark = useCell(dark);
  const lang = useLang();
  return (
    <header class="top">
      <button type="button" class="icon-button" onClick={onSide} aria-expanded={side} aria-label={t("Conversations")} title={t("Conversations (s)")}><Icon name="side" /></button>
      <ModelChoice />
      <span class="grow" />
      <button type="button" class="icon-button only-narrow" onClick={() => start()} aria-label={t("New chat")}><Icon name="plus" /></button>
      <button type="button" class="text-button" onClick={() => setLang(lang === "en" ? "zh" : "en")} lang={lang === "en" ? "zh" : "en"} aria-label={lang === "en" ? "切换到中文" : "Switch to English"}>{lang === "en" ? "中文" : "EN"}</button>
      <button type="button" class="icon-button" onClick={switchTheme} aria-label={t(isDark ? "Light theme" : "Dark theme")} title={t(isDark ? "Light theme" : "Dark theme")}><Icon name={isDark ? "sun" : "moon"} /></button>
      <button type="button" class="icon-button only-wide" onClick={onHelp} aria-label={t("Help")} title={t("Help (?)")}><Icon name="help" /></button>
      <button type="button" class="icon-button" onClick={onParams} aria-expanded={params} aria-label={t("Parameters")} title={t("Parameters (p)")}><Icon name="sliders" /></button>
    </header>
  );
}

/** The models, each with the adapters that change it. */
function ModelChoice() {
  const { list } = useCell(models);
  const { model } = useCell(settings);
  if (!list?.length) return <span class="brand"><b>deepseek</b> <span>chat</span></span>;
  const bases = list.filter((m) => !m.parent || !list.some((x) => x.id === m.parent));
  const of = (id: string) => list.filter((m) => m.parent === id && m.id !== id);
  return (
    <select class="model" aria-label={t("Model")} value={model} onChange={(e) => set({ model: e.currentTarget.value })}>
      {bases.map((m) => [
        <option key={m.id} value={m.id}>{m.id}</option>,
        of(m.id).length ? <optgroup key={`${m.id}/`} label={t("Adapters of {model}", { model: m.id })}>{of(m.id).map((a) => <option key={a.id} value={a.id}>{a.id}</option>)}</optgroup> : null,
      ])}
    </select>
  );
}

function KeyEntry({ why, onClose, onKey }: { why: string; onClose: () => void; onKey: () => void }) {
  const enter = (e: SubmitEvent & { currentTarget: HTMLFormElement }) => {
    e.preventDefault();
    const text = String(new FormData(e.currentTarget).get("key"));
    if (!text.trim()) return;
    setKey(text);
    onClose();
    onKey();
  };
  return (
    <Dialog title={t("The server wants an API key.")} onClose={onClose}>
      <form class="key-entry" onSubmit={enter}>
        <p class="note">{why}</p>
        <label><span>{t("API key")}</span><input name="key" type="password" autocomplete="off" required autofocus /></label>
        <p class="note">{t("Kept in this tab until it is closed, and sent to this server only.")}</p>
        <footer>
          <button type="button" class="button" onClick={onClose}>{t("Cancel")}</button>
          <button type="submit" class="button primary">{t("Use this key")}</button>
        </footer>
      </form>
    </Dialog>
  );
}

const KEYS: [string, string][] = [
  ["Enter", "Send"], ["⇧ Enter", "A new line"], ["Esc", "Stop the answer"], ["↑", "In an empty field: edit the last question"], ["n", "New chat"], ["i", "To the message field"], ["/", "Search conversations"], ["j k", "Next and previous conversation"],
  ["e", "Edit the last question"], ["r", "Answer again"], ["← →", "In the tokens: move; up and down by ten"], ["[ ]", "In the tokens: another layer"], ["s", "Conversations"], ["p", "Parameters"], ["t", "Dark or light"], ["l", "中文 / English"], ["?", "This help"],
];

function Help({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title={t("Keys")} onClose={onClose}>
      <dl class="keys">{KEYS.map(([k, what]) => <div key={k}><dt>{k.split(" ").map((x) => <kbd key={x}>{x}</kbd>)}</dt><dd>{t(what)}</dd></div>)}</dl>
      <ul class="how">
        <li>{t("Conversations and settings stay in this browser. The API key stays in this tab. Nothing is sent anywhere but to this server.")}</li>
        <li>{t("An edited question and a second answer are kept beside the first: ‹ 1/2 › switches.")}</li>
        <li>{t("Tokens under an answer shows which experts and branches made each of them, and how likely it was.")}</li>
      </ul>
    </Dialog>
  );
}
