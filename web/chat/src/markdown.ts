// Markdown as models write it, read into a tree of plain values. No text becomes HTML anywhere: the drawing
// (prose.tsx) makes elements from the tree, so markup in an answer is shown as the characters it is.
//
// CommonMark 0.31 with GitHub's tables, strike-through, task lists and bare links, without HTML blocks, reference links and
// footnotes; images become links, because loading one would tell its server who reads. Work is linear in the text but for
// bounded depths, so hostile nesting cannot hold the page.

import { type Inline, inline } from "./inline";

export type Align = "left" | "center" | "right" | null;
export interface Item {
  task: boolean | null; // of a task list: whether it is done
  blocks: Block[];
}
export type Block = { raw: string } & (
  | { kind: "heading"; level: number; text: Inline[] }
  | { kind: "paragraph"; text: Inline[] }
  | { kind: "code"; language: string; text: string; open: boolean } // open: its end has not come yet
  | { kind: "math"; text: string }
  | { kind: "quote"; blocks: Block[] }
  | { kind: "list"; start: number | null; tight: boolean; items: Item[] }
  | { kind: "table"; align: Align[]; head: Inline[][]; rows: Inline[][][] }
  | { kind: "rule" }
);

const DEEPEST = 12;
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>[ ]?/;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})[.)])([ \t]+|$)/;
const CELLS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const SETEXT = /^ {0,3}(=+|-+)[ \t]*$/;

export function markdown(text: string): Block[] {
  return read(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

/** The blocks of a text that grows at its end: what lies before its last two blocks is not read again. */
export class Growing {
  private text = "";
  private settled: Block[] = [];
  private from = 0; // where the first block that may still change begins

  blocks(text: string): Block[] {
    if (!text.startsWith(this.text.slice(0, this.from))) [this.settled, this.from] = [[], 0];
    const lines = text.slice(this.from).replace(/\r\n?/g, "\n").split("\n");
    const starts: number[] = [];
    const fresh = read(lines, 0, starts);
    const all = [...this.settled, ...fresh];
    if (fresh.length > 2 && !text.includes("\r")) {
      const done = fresh.length - 2;
      this.from += lines.slice(0, starts[done]).reduce((n, l) => n + l.length + 1, 0);
      this.settled = all.slice(0, this.settled.length + done);
    }
    this.text = text;
    return all;
  }
}

type Found = { block: Block; next: number } | null;
/** ``block`` without its ``raw``, which ``read`` fills in from the lines it took. */
type Bare = Block extends infer B ? (B extends Block ? Omit<B, "raw"> : never) : never;
const found = (block: Bare, next: number): Found => ({ block: block as Block, next });

function read(lines: string[], depth: number, starts: number[] = []): Block[] {
  const out: Block[] = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i++;
      continue;
    }
    const { block, next } = one(lines, i, depth)!;
    block.raw = lines.slice(i, next).join("\n");
    starts.push(i);
    out.push(block);
    i = next;
  }
  return out;
}

function one(lines: string[], i: number, depth: number): Found {
  return (
    code(lines, i) ?? indented(lines, i) ?? math(lines, i) ?? heading(lines, i) ??
    (RULE.test(lines[i]) ? found({ kind: "rule" }, i + 1) : null) ??
    (depth < DEEPEST ? (quote(lines, i, depth) ?? list(lines, i, depth)) : null) ?? table(lines, i) ?? paragraph(lines, i)
  );
}

function code(lines: string[], i: number): Found {
  const fence = FENCE.exec(lines[i]);
  if (!fence || (fence[2][0] === "`" && fence[3].includes("`"))) return null;
  const [, indent, marks, info] = fence;
  const ends = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  const inside: string[] = [];
  const strip = new RegExp(`^ {0,${indent.length}}`);
  let at = i + 1;
  while (at < lines.length && !ends.test(lines[at])) inside.push(lines[at++].replace(strip, ""));
  const open = at >= lines.length;
  return found({ kind: "code", language: info.trim().split(/\s+/)[0], text: inside.join("\n"), open }, open ? at : at + 1);
}

function indented(lines: string[], i: number): Found {
  const inside: string[] = [];
  let at = i;
  for (; at < lines.length && (/^( {4}|\t)/.test(lines[at]) || (inside.length && !lines[at].trim())); at++) inside.push(lines[at].replace(/^( {4}|\t| +$)/, ""));
  if (!inside.length) return null;
  while (!inside[inside.length - 1].trim()) {
    inside.pop();
    at--;
  }
  return found({ kind: "code", language: "", text: inside.join("\n"), open: false }, at);
}

/** ``$$ … $$`` and ``\[ … \]`` on lines of their own: shown as written, safe from being read as emphasis. */
function math(lines: string[], i: number): Found {
  const begin = /^ {0,3}(\$\$|\\\[)(.*)$/.exec(lines[i]);
  if (!begin) return null;
  const end = begin[1] === "$$" ? "$$" : "\\]";
  const inside: string[] = [];
  for (let at = i; at < Math.min(lines.length, i + 60) && (at === i || lines[at].trim()); at++) {
    const line = at === i ? begin[2] : lines[at];
    const cut = line.indexOf(end);
    if (cut >= 0) return line.slice(cut + 2).trim() ? null : found({ kind: "math", text: [...inside, line.slice(0, cut)].join("\n").trim() }, at + 1);
    inside.push(line);
  }
  return null;
}

function heading(lines: string[], i: number): Found {
  const match = HEADING.exec(lines[i]);
  if (!match) return null;
  const text = lines[i].slice(match[0].length).trim();
  let end = text.length; // "# title ##": marks at the end are no text
  while (text[end - 1] === "#") end--;
  const said = end === 0 || /[ \t]/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
  return found({ kind: "heading", level: match[1].length, text: inline(said) }, i + 1);
}

function quote(lines: string[], i: number, depth: number): Found {
  if (!QUOTE.test(lines[i])) return null;
  const inside: string[] = [];
  let at = i;
  for (; at < lines.length; at++) {
    if (QUOTE.test(lines[at])) inside.push(lines[at].replace(QUOTE, ""));
    else if (goesOn(lines[at], inside[inside.length - 1])) inside.push(lines[at]);
    else break;
  }
  return found({ kind: "quote", blocks: read(inside, depth + 1) }, at);
}

/** Whether a line without the mark of its quote or list still belongs to the paragraph before it. */
function goesOn(line: string, before: string): boolean {
  return Boolean(line.trim()) && Boolean(before.trim()) && !interrupts(line) && !/^( {4}|\t)/.test(before) && !FENCE.test(before) && !HEADING.test(before) && !RULE.test(before);
}

function interrupts(line: string): boolean {
  const item = ITEM.exec(line);
  const begins = item !== null && line.trim().length > item[2].length && (item[3] === undefined || item[3] === "1");
  return begins || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function list(lines: string[], i: number, depth: number): Found {
  const first = ITEM.exec(lines[i]);
  if (!first) return null;
  const mark = first[2][first[2].length - 1]; // items of one list share it
  const items: Item[] = [];
  let [at, loose] = [i, false];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[2][item[2].length - 1] !== mark || (RULE.test(lines[at]) && at > i)) break;
    const gap = item[4].length > 4 || !item[4] ? 1 : item[4].length;
    const width = item[1].length + item[2].length + gap;
    const inside = [lines[at].slice(Math.min(width, item[0].length))];
    at++;
    for (; at < lines.length; at++) {
      const line = lines[at];
      const room = /^ */.exec(line)![0].length;
      if (!line.trim()) {
        if (inside.length === 1 && !inside[0].trim()) break; // an item cannot begin with two empty lines
        inside.push("");
      } else if (room >= width || line[0] === "\t") inside.push(line[0] === "\t" ? line.slice(1) : line.slice(width));
      else if (!ITEM.test(line) && goesOn(line, inside[inside.length - 1])) inside.push(line);
      else break;
    }
    let blank = 0;
    while (inside.length > 1 && !inside[inside.length - 1].trim()) {
      inside.pop();
      blank++;
    }
    const task = /^\[([ xX])\][ \t]+/.exec(inside[0]);
    if (task) inside[0] = inside[0].slice(task[0].length);
    const blocks = read(inside, depth + 1);
    const follows = at < lines.length && ITEM.exec(lines[at])?.[2].slice(-1) === mark;
    loose ||= (blank > 0 && follows) || between(blocks, inside);
    items.push({ task: task ? task[1] !== " " : null, blocks });
    if (!follows) {
      at -= blank;
      break;
    }
  }
  return found({ kind: "list", start: first[3] === undefined ? null : Number(first[3]), tight: !loose, items }, at);
}

/** Whether an empty line lies between two blocks of an item, and not inside one of them. */
function between(blocks: Block[], lines: string[]): boolean {
  const within = blocks.reduce((n, b) => n + b.raw.split("\n").length, 0);
  return blocks.length > 1 && within < lines.filter((l, i) => i > 0 || l.trim()).length;
}

export function cells(line: string): string[] {
  const inner = line.trim().replace(/^\|/, "");
  const out: string[] = [];
  let cell = "";
  for (let i = 0; i < inner.length; i++) {
    if (inner[i] === "\\" && inner[i + 1] === "|") cell += inner[++i];
    else if (inner[i] === "|") {
      out.push(cell.trim());
      cell = "";
    } else cell += inner[i];
  }
  if (cell.trim() || !inner.endsWith("|")) out.push(cell.trim());
  return out;
}

function table(lines: string[], i: number): Found {
  const rule = lines[i + 1];
  if (rule === undefined || !lines[i].includes("|") || !CELLS.test(rule) || !/[|:]/.test(rule)) return null;
  const [head, marks] = [cells(lines[i]), cells(rule)];
  if (head.length !== marks.length) return null;
  const align = marks.map((m): Align => (m.endsWith(":") ? (m.startsWith(":") ? "center" : "right") : m.startsWith(":") ? "left" : null));
  const rows: Inline[][][] = [];
  let at = i + 2;
  for (; at < lines.length && lines[at].trim() && !interrupts(lines[at]); at++) {
    const row = cells(lines[at]);
    rows.push(head.map((_, k) => inline(row[k] ?? "")));
  }
  return found({ kind: "table", align, head: head.map((c) => inline(c)), rows }, at);
}

function paragraph(lines: string[], i: number): Found {
  const inside = [lines[i]];
  let at = i + 1;
  for (; at < lines.length && lines[at].trim(); at++) {
    const under = SETEXT.exec(lines[at]);
    if (under) return found({ kind: "heading", level: under[1][0] === "=" ? 1 : 2, text: inline(joined(inside)) }, at + 1);
    if (interrupts(lines[at]) || table(lines, at) || math(lines, at)) break;
    inside.push(lines[at]);
  }
  return found({ kind: "paragraph", text: inline(joined(inside)) }, at);
}

const joined = (lines: string[]) => lines.map((l) => l.replace(/^[ \t]+/, "")).join("\n").trimEnd();
