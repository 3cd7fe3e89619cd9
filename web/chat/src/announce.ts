// What a screen reader is told. An answer is read out in whole sentences, at most one batch every few seconds, not word by word.

import { Cell } from "../../src/cell";

export const announced = new Cell("");
const GAP = 4000; // ms between two batches of a streaming answer
const LONGEST = 600; // characters of one batch

let flip = false;
/** Say it, even if it is what was said last. */
export function say(text: string): void {
  flip = !flip;
  announced.value = text + (flip ? "" : "\u00a0");
}

/** Follows one answer. */
export class Reading {
  private told = 0;
  private last = Date.now();

  follow(text: string): void {
    if (Date.now() - this.last < GAP) return;
    const end = sentenceEnd(text);
    if (end <= this.told) return;
    this.batch(text.slice(this.told, end));
    this.told = end;
  }

  end(text: string, word: string): void {
    const rest = plain(text.slice(this.told));
    say(`${rest.length > LONGEST ? `…${rest.slice(-LONGEST)}` : rest} ${word}`.trim());
  }

  private batch(text: string): void {
    this.last = Date.now();
    const words = plain(text);
    say(words.length > LONGEST ? `…${words.slice(-LONGEST)}` : words);
  }
}

function sentenceEnd(text: string): number {
  let end = 0;
  for (const match of text.matchAll(/[.!?:;](?=\s)|[。!?;]|\n/g)) end = match.index + 1;
  return end;
}

const plain = (text: string) => text.replace(/[`*_#>|]+/g, "").replace(/\s+/g, " ").trim();
