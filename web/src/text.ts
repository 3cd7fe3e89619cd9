// English is written where it is used; Chinese is looked up by it. A test checks that no word is missing.

import { Cell, remember, remembered, useCell } from "./cell";

/** Chinese by English; each page brings its own words. */
const ZH: Record<string, string> = {};
export const learn = (words: Record<string, string>) => void Object.assign(ZH, words);

export type Lang = "en" | "zh";
const wished = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
export const lang = new Cell<Lang>(remembered("lang", wished) as Lang);

export function setLang(next: Lang): void {
  remember("lang", next);
  lang.value = next;
  document.documentElement.lang = next === "zh" ? "zh-CN" : "en";
}
document.documentElement.lang = lang.value === "zh" ? "zh-CN" : "en";

/** What was asked for in vain: the tests walk through all pages and expect it to stay empty. */
export const untranslated = new Set<string>();
Object.assign(globalThis, { deepseekUntranslated: untranslated });

/** A word that the server chose (a status, a kind of event): translated if known, else as it is. */
export const word = (text: string) => (lang.value === "zh" ? (ZH[text] ?? text) : text);

/** ``t("{n} runs", {n: 3})``: the text in the reader's language, with its blanks filled. */
export function t(english: string, blanks: Record<string, string | number> = {}): string {
  const chinese = ZH[english];
  if (chinese === undefined && english) untranslated.add(english);
  const text = lang.value === "zh" ? (chinese ?? english) : english;
  return text.replace(/\{(\w+)\}/g, (_, key) => String(blanks[key] ?? ""));
}

/** The run's own title of an incident ("Loss spike at step 7"), in the reader's language where it is one of the known. */
export function titleOf(title: string): string {
  const [, what, step] = /^(.*) at step (\d+)$/.exec(title) ?? [];
  return what && lang.value === "zh" && ZH[what] ? `${ZH[what]},第 ${step} 步` : title;
}

/** "layer 3" of "3"; "embedding" and "head" as they are. */
export const layerName = (l: number | string) => (/^\d+$/.test(String(l)) ? `${t("layer")} ${l}` : word(String(l)));

export const useLang = () => useCell(lang);
export const said = (text: { en: string; zh: string } | string | null | undefined) =>
  typeof text === "string" ? text : text ? text[lang.value] || text.en : "";
