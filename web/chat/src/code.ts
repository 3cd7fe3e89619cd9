// Colours for code: comments, texts, numbers, keywords, names that are called. One scan that knows a little of many languages.

export interface Piece {
  kind: "" | "comment" | "text" | "number" | "keyword" | "call" | "hidden";
  of: string;
}

const C = "break case catch class const continue default delete do else enum extends false finally for if import in instanceof interface new null private protected public return static struct super switch this throw true try typeof typedef union using var virtual void while";
const KEYWORDS: Record<string, string> = {
  python: "and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return True try while with yield self",
  javascript: `${C} async await export from function let of yield undefined type keyof readonly implements`,
  rust: "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type unsafe use where while",
  go: "break case chan const continue default defer else fallthrough false for func go goto if import interface map nil package range return select struct switch true type var",
  c: `${C} auto bool char double float int long short signed sizeof unsigned template typename namespace nullptr constexpr inline override final boolean package`,
  bash: "if then else elif fi for in do done while until case esac function return local export set exit source echo cd",
  sql: "select from where group by order having limit insert into values update set delete create table drop alter join left right inner outer on as and or not null is in distinct union all primary key with case when then else end",
  json: "true false null",
  yaml: "true false null yes no",
};
const SAME: Record<string, string> = {
  py: "python", python3: "python", pycon: "python", js: "javascript", jsx: "javascript", ts: "javascript", tsx: "javascript", typescript: "javascript", rs: "rust", golang: "go",
  cpp: "c", "c++": "c", h: "c", hpp: "c", cs: "c", csharp: "c", java: "c", kotlin: "c", swift: "c", cuda: "c", sh: "bash", shell: "bash", zsh: "bash", console: "bash", jsonl: "json", yml: "yaml", toml: "yaml",
};
/** Characters that reorder what a reader sees, so that code may look like other code (CVE-2021-42574); shown by their number. */
const REORDERING = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/;
const LONGEST = 40_000; // characters: more is shown without colours

const HASH = new Set(["python", "bash", "yaml"]);
const tables = new Map<string, { words: Set<string>; scan: RegExp }>();

function table(language: string): { words: Set<string>; scan: RegExp } | null {
  const name = SAME[language] ?? language;
  if (!Object.hasOwn(KEYWORDS, name)) return null;
  const known = tables.get(name);
  if (known) return known;
  const comment = HASH.has(name) ? "#[^\\n]*" : name === "sql" ? "--[^\\n]*" : "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)";
  const long = name === "python" ? "\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|" : name === "javascript" || name === "go" ? "`(?:\\\\[^]|[^`\\\\])*(?:`|$)|" : "";
  const text = `${long}"(?:\\\\.|[^"\\\\\\n])*(?:"|$|(?=\\n))|'(?:\\\\.|[^'\\\\\\n])*(?:'|$|(?=\\n))`;
  const number = "\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b";
  const scan = new RegExp(`(${comment})|(${text})|(${number})|([A-Za-z_$][\\w$]*)`, "g");
  const made = { words: new Set(KEYWORDS[name].split(" ")), scan };
  tables.set(name, made);
  return made;
}

export function pieces(text: string, language: string): Piece[] {
  const found = coloured(text, language);
  if (!REORDERING.test(text)) return found;
  const each = new RegExp(`(${REORDERING.source})`);
  return found.flatMap((p) => p.of.split(each).filter(Boolean).map((of): Piece => (REORDERING.test(of) ? { kind: "hidden", of: `U+${of.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}` } : { ...p, of })));
}

function coloured(text: string, language: string): Piece[] {
  const found = text.length <= LONGEST ? table(language.toLowerCase()) : null;
  if (!found) return [{ kind: "", of: text }];
  const { words, scan } = found;
  const sql = words.has("select");
  const out: Piece[] = [];
  let from = 0;
  const put = (kind: Piece["kind"], start: number, stop: number) => {
    if (start > from) out.push({ kind: "", of: text.slice(from, start) });
    out.push({ kind, of: text.slice(start, stop) });
    from = stop;
  };
  scan.lastIndex = 0;
  for (let m = scan.exec(text); m; m = scan.exec(text)) {
    const stop = scan.lastIndex;
    if (m[1]) put("comment", m.index, stop);
    else if (m[2]) put("text", m.index, stop);
    else if (m[3]) put("number", m.index, stop);
    else if (words.has(sql ? m[4].toLowerCase() : m[4])) put("keyword", m.index, stop);
    else if (text[stop] === "(") put("call", m.index, stop);
  }
  if (from < text.length) out.push({ kind: "", of: text.slice(from) });
  return out;
}
