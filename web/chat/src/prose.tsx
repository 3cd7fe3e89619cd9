// Draws the tree of markdown.ts. A block whose text has not changed is not drawn again, which keeps streaming cheap.

import { Component, type ComponentChildren } from "preact";
import { useMemo, useRef } from "preact/hooks";
import { t } from "../../src/text";
import { pieces } from "./code";
import { CopyButton } from "./copy";
import type { Inline } from "./inline";
import { type Block, Growing } from "./markdown";

export function Markdown({ text }: { text: string }) {
  const growing = useRef<Growing>(null as never);
  growing.current ??= new Growing();
  const blocks = useMemo(() => growing.current.blocks(text), [text]);
  return <div class="prose">{blocks.map((block, i) => <Drawn key={i} block={block} />)}</div>;
}

class Drawn extends Component<{ block: Block }, { failed: boolean }> {
  /** What cannot be drawn (nested beyond the browser's stack) is shown as it is written. */
  componentDidCatch(): void {
    this.setState({ failed: true });
  }
  shouldComponentUpdate(next: { block: Block }, state: { failed: boolean }): boolean {
    if (state.failed !== this.state.failed) return true;
    const [a, b] = [this.props.block, next.block];
    return a.raw !== b.raw || a.kind !== b.kind || (a.kind === "code" && b.kind === "code" && a.open !== b.open);
  }
  render() {
    return this.state.failed ? <p>{this.props.block.raw}</p> : drawn(this.props.block);
  }
}

const all = (blocks: Block[]): ComponentChildren => blocks.map((block, i) => <Drawn key={i} block={block} />);

function drawn(block: Block): ComponentChildren {
  switch (block.kind) {
    case "paragraph":
      return <p>{spans(block.text)}</p>;
    case "heading": {
      const Tag = `h${Math.min(block.level + 2, 6)}` as "h3"; // the page's own headings come before
      return <Tag class={`level-${block.level}`}>{spans(block.text)}</Tag>;
    }
    case "code":
      return <Code language={block.language} text={block.text} />;
    case "math":
      return <pre class="math" tabIndex={0} role="region" aria-label={t("Formula")}>{block.text}</pre>;
    case "quote":
      return <blockquote>{all(block.blocks)}</blockquote>;
    case "rule":
      return <hr />;
    case "table":
      return <Table block={block} />;
    case "list":
      return <List block={block} />;
  }
}

function List({ block }: { block: Block & { kind: "list" } }) {
  const items = block.items.map((item, i) => (
    <li key={i} class={item.task === null ? undefined : "task"}>
      {item.task !== null && <input type="checkbox" checked={item.task} disabled aria-label={t(item.task ? "done" : "open")} />}
      {item.blocks.map((b, k) => (block.tight && b.kind === "paragraph" ? <span key={k} class="tight">{spans(b.text)}</span> : <Drawn key={k} block={b} />))}
    </li>
  ));
  return block.start === null ? <ul>{items}</ul> : <ol start={block.start}>{items}</ol>;
}

function Table({ block }: { block: Block & { kind: "table" } }) {
  const at = (i: number) => (block.align[i] ? `align-${block.align[i]}` : undefined);
  return (
    <div class="table-scroll" tabIndex={0} role="region" aria-label={t("Table")}>
      <table>
        <thead><tr>{block.head.map((c, i) => <th key={i} scope="col" class={at(i)}>{spans(c)}</th>)}</tr></thead>
        <tbody>{block.rows.map((row, r) => <tr key={r}>{row.map((c, i) => <td key={i} class={at(i)}>{spans(c)}</td>)}</tr>)}</tbody>
      </table>
    </div>
  );
}

function Code({ language, text }: { language: string; text: string }) {
  const parts = useMemo(() => pieces(text, language), [text, language]);
  return (
    <figure class="code">
      <figcaption><span>{language || t("code")}</span><CopyButton text={text} label={t("Copy code")} /></figcaption>
      <pre tabIndex={0} role="region" aria-label={language ? t("Code in {language}", { language }) : t("code")}>
        <code>{parts.map((p, i) => (p.kind ? <span key={i} class={`c-${p.kind}`}>{p.of}</span> : p.of))}</code>
      </pre>
    </figure>
  );
}

function spans(text: Inline[]): ComponentChildren {
  return text.map((part, i) => {
    if (typeof part === "string") return part;
    if ("text" in part) return <code key={i} class={part.kind === "math" ? "math" : undefined}>{part.text}</code>;
    if (part.kind === "break") return <br key={i} />;
    if (part.kind === "link") return <a key={i} href={part.href} target="_blank" rel="noopener noreferrer nofollow">{spans(part.of)}</a>;
    const Tag: "em" | "strong" | "del" = part.kind;
    return <Tag key={i}>{spans(part.of)}</Tag>;
  });
}
