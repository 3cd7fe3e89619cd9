// The text inside a block: emphasis by CommonMark's delimiter runs, code, links, line breaks.

export type Inline =
  | string
  | { kind: "em" | "strong" | "del"; of: Inline[] }
  | { kind: "code" | "math"; text: string }
  | { kind: "link"; href: string; of: Inline[] }
  | { kind: "break" };

interface Run {
  run: string; // the character
  count: number;
  length: number; // as it was read
  opens: boolean;
  closes: boolean;
}
type Part = Inline | Run;
const isRun = (p: Part): p is Run => typeof p === "object" && "run" in p;

const DEEPEST = 8; // links within images within …
const MOST_RUNS = 2000; // more than that is not emphasis
const LONGEST = 50_000; // characters of one block that are read; what follows is shown as it is written
const LONGEST_RUN = 16; // a longer one is a line of stars, and would nest as deep
const PUNCTUATION = /[\p{P}\p{S}]/u;
const NAMED: Record<string, string> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", hellip: "…", mdash: "—", ndash: "–", times: "×", rarr: "→", larr: "←" };

/** Where a link may lead: pages and mail, never code (``javascript:``, ``data:``) and never this server itself. */
export function safe(address: string): string | null {
  const plain = address.replace(/[\u0000-\u0020\u007f-\u009f\u200b-\u200f\u2028-\u202e\ufeff]/g, "");
  if (!/^(https?:\/\/[^/]|mailto:[^\s])/i.test(plain)) return null;
  try {
    return new URL(plain).href;
  } catch {
    return null;
  }
}

export function inline(text: string, depth = 0, linked = false): Inline[] {
  const read = emphasise(new Reader(text.slice(0, LONGEST), depth, linked).parts());
  return text.length > LONGEST ? [...read, text.slice(LONGEST)] : read;
}

class Reader {
  private out: Part[] = [];
  private plain = "";
  private at = 0;
  private runs = 0;
  private closing: Map<number, number>; // "[" → its "]"
  private missing = new Set<number>(); // lengths of backtick runs that no other run closes
  private endless = new Set<string>(); // ends of formulas that do not come any more

  constructor(
    private text: string,
    private depth: number,
    private linked: boolean,
  ) {
    this.closing = brackets(text);
  }

  parts(): Part[] {
    const { text } = this;
    while (this.at < text.length) {
      const c = text[this.at];
      const taken =
        c === "\\" ? this.escape() : c === "`" ? this.code() : c === "*" || c === "_" || c === "~" ? this.run(c) : c === "[" || c === "!" ? this.link() :
        c === "<" ? this.autolink() : c === "h" || c === "H" ? this.bare() : c === "&" ? this.entity() : c === "\n" ? this.newline() : c === "$" ? this.math("$$", "$$") : false;
      if (!taken) {
        this.plain += c;
        this.at++;
      }
    }
    this.flush();
    return this.out;
  }

  private flush(): void {
    if (this.plain) this.out.push(this.plain);
    this.plain = "";
  }

  private put(part: Part, next: number): true {
    this.flush();
    this.out.push(part);
    this.at = next;
    return true;
  }

  private escape(): boolean {
    const next = this.text[this.at + 1];
    if (next === "(" && this.math("\\(", "\\)")) return true;
    if (next === "[" && this.math("\\[", "\\]")) return true;
    if (next === "\n") return this.put({ kind: "break" }, this.at + 2);
    if (next === undefined || !/[!-/:-@[-`{-~]/.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  private math(begin: string, end: string): boolean {
    if (!this.text.startsWith(begin, this.at) || this.endless.has(end)) return false;
    const stop = this.text.indexOf(end, this.at + 2);
    if (stop < 0) this.endless.add(end);
    if (stop < 0 || stop === this.at + 2 || stop - this.at > 2000) return false;
    return this.put({ kind: "math", text: this.text.slice(this.at + 2, stop).trim() }, stop + 2);
  }

  private code(): boolean {
    const { text, at } = this;
    let n = 1;
    while (text[at + n] === "`") n++;
    for (let i = at + n; !this.missing.has(n) && i < text.length; ) {
      const start = text.indexOf("`", i);
      if (start < 0) break;
      let stop = start;
      while (text[stop] === "`") stop++;
      if (stop - start === n) {
        const inside = text.slice(at + n, start).replace(/\n/g, " ");
        const trimmed = /^ .* $/.test(inside) && inside.trim() ? inside.slice(1, -1) : inside;
        return this.put({ kind: "code", text: trimmed }, stop);
      }
      i = stop;
    }
    this.missing.add(n);
    this.plain += text.slice(at, at + n);
    this.at = at + n;
    return true;
  }

  private run(c: string): boolean {
    const { text, at } = this;
    let n = 1;
    while (text[at + n] === c) n++;
    if ((c === "~" && n !== 2) || n > LONGEST_RUN || ++this.runs > MOST_RUNS) {
      this.plain += text.slice(at, at + n);
      this.at = at + n;
      return true;
    }
    const before = at ? (/[\uDC00-\uDFFF]/.test(text[at - 1]) ? text.slice(at - 2, at) : text[at - 1]) : " ";
    const after = at + n < text.length ? String.fromCodePoint(text.codePointAt(at + n)!) : " ";
    const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
    const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
    const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
    const opens = c === "_" ? left && (!right || markBefore) : left;
    const closes = c === "_" ? right && (!left || markAfter) : right;
    return this.put({ run: c, count: n, length: n, opens, closes }, at + n);
  }

  private link(): boolean {
    const { text } = this;
    const image = text[this.at] === "!";
    const open = image ? this.at + 1 : this.at;
    if (text[open] !== "[") return false;
    const close = this.closing.get(open);
    if (close === undefined || text[close + 1] !== "(") return false;
    const rest = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'|\([^()]*\)))?\s*\)/.exec(text.slice(close + 1, close + 3000));
    if (!rest) return false;
    const href = safe((rest[1] ?? rest[2] ?? "").replace(/\\([!-/:-@[-`{-~])/g, "$1").replace(/&amp;/g, "&"));
    const label = text.slice(open + 1, close);
    const next = close + 1 + rest[0].length;
    const of = this.depth < DEEPEST ? inline(label, this.depth + 1, true) : [label];
    if (href === null || this.linked) {
      this.flush();
      this.out.push(...of);
      this.at = next;
      return true;
    }
    return this.put({ kind: "link", href, of: of.length ? of : [href] }, next);
  }

  private autolink(): boolean {
    const match = /^<([a-zA-Z][a-zA-Z0-9+.-]{1,31}:[^\s<>]*|[\w.+-]+@[\w-]+(?:\.[\w-]+)+)>/.exec(this.text.slice(this.at, this.at + 2000));
    const href = match && safe(match[1].includes(":") ? match[1] : `mailto:${match[1]}`);
    return match && href && !this.linked ? this.put({ kind: "link", href, of: [match[1]] }, this.at + match[0].length) : false;
  }

  private bare(): boolean {
    if (this.linked || (this.at && /[\w@/]/.test(this.text[this.at - 1]))) return false;
    const match = /^https?:\/\/[^\s<>"`*|\\^{}\u3000-\u303f\uff00-\uffef]+/i.exec(this.text.slice(this.at, this.at + 2000));
    if (!match) return false;
    const address = balanced(match[0]).replace(/[?!.,:;'_~\]]+$/, "");
    const href = safe(address);
    return href ? this.put({ kind: "link", href, of: [address] }, this.at + address.length) : false;
  }

  private entity(): boolean {
    const match = /^&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-zA-Z]{2,8}));/.exec(this.text.slice(this.at, this.at + 12));
    if (!match) return false;
    const point = match[1] ? Number(match[1]) : match[2] ? parseInt(match[2], 16) : 0;
    const said = match[3] ? NAMED[match[3]] : point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : "\ufffd";
    if (said === undefined) return false;
    this.plain += said;
    this.at += match[0].length;
    return true;
  }

  private newline(): boolean {
    const hard = this.plain.endsWith("  ");
    while (this.plain.endsWith(" ")) this.plain = this.plain.slice(0, -1);
    if (hard) return this.put({ kind: "break" }, this.at + 1);
    this.plain += "\n";
    this.at++;
    return true;
  }
}

/** An address up to the first ")" that closes nothing in it: "(see https://example.org)". */
function balanced(address: string): string {
  let depth = 0;
  for (let i = 0; i < address.length; i++) {
    if (address[i] === "(") depth++;
    else if (address[i] === ")" && --depth < 0) return address.slice(0, i);
  }
  return address;
}

/** Each "[" with the "]" that closes it, code spans and escapes left out; one pass. */
function brackets(text: string): Map<number, number> {
  const out = new Map<number, number>();
  if (!text.includes("](")) return out;
  const open: number[] = [];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "[") open.push(i);
    else if (text[i] === "]") {
      const at = open.pop();
      if (at !== undefined) out.set(at, i);
    }
  }
  return out;
}

/** CommonMark's "process emphasis": each closing run looks back for the nearest opening one. */
function emphasise(parts: Part[]): Inline[] {
  const floor = new Map<string, number>(); // below it no opener of this kind is left
  for (let c = 0; c < parts.length; c++) {
    const closer = parts[c];
    if (!isRun(closer) || !closer.closes || !closer.count) continue;
    const kind = `${closer.run}${closer.opens}${closer.length % 3}`;
    let o = c - 1;
    for (; o >= (floor.get(kind) ?? 0); o--) {
      const p = parts[o];
      if (isRun(p) && p.run === closer.run && p.opens && p.count && !odd(p, closer)) break;
    }
    if (o < (floor.get(kind) ?? 0)) {
      floor.set(kind, c);
      continue;
    }
    const opener = parts[o] as Run;
    const use = closer.run === "~" ? 2 : Math.min(opener.count, closer.count, 2);
    const of = parts.splice(o + 1, c - o - 1).flatMap(settle);
    const made: Inline = { kind: closer.run === "~" ? "del" : use === 2 ? "strong" : "em", of };
    opener.count -= use;
    closer.count -= use;
    parts.splice(o + 1, 0, made);
    c = o + 1; // the closer now follows the new part; look at it again
    for (const [k, at] of floor) if (at > o) floor.set(k, o + 1);
  }
  return parts.flatMap(settle);
}

/** The rule of three: runs that both open and close match only if their lengths do. */
const odd = (a: Run, b: Run) => (a.closes || b.opens) && (a.length + b.length) % 3 === 0 && !(a.length % 3 === 0 && b.length % 3 === 0);
const settle = (p: Part): Inline[] => (isRun(p) ? (p.count ? [p.run.repeat(p.count)] : []) : [p]);
