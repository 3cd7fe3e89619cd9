// What a running run sends by itself. Rows come often; the page redraws its charts at most every two seconds.

import { runPath } from "./api";
import { Cell } from "./cell";

const REDRAW_MS = 2000;
const TELL_MS = 250; // numbers change at most four times a second

export class Live {
  readonly last = new Cell<Map<string, number | null>>(new Map());
  readonly step = new Cell<number | null>(null);
  readonly beat = new Cell(0); // counts redraws: panels read again when it moves
  readonly heard = new Cell<number>(0); // ms of the last message
  readonly incidents = new Cell(0); // counts new incidents
  readonly actions = new Cell(0); // counts news of actions
  readonly status = new Cell<Record<string, unknown> | null>(null);
  readonly connected = new Cell(false);
  private source: EventSource | null = null;
  private timer = 0;
  private telling = 0;
  private pending: Map<string, number | null> | null = null;
  private newest: number | null = null;

  constructor(readonly run: string) {}

  // A browser gives a host six connections: a tab that nobody sees gives its own back, and catches up when seen again.
  open(): () => void {
    const follow = () => {
      this.source?.close();
      this.source = null;
      if (document.hidden) return;
      this.listen();
      this.redraw();
    };
    document.addEventListener("visibilitychange", follow);
    follow();
    return () => {
      document.removeEventListener("visibilitychange", follow);
      this.source?.close();
      clearTimeout(this.timer);
      clearTimeout(this.telling);
    };
  }

  private listen(): void {
    const source = (this.source = new EventSource(runPath(this.run, "/stream")));
    source.onopen = () => (this.connected.value = true);
    source.onerror = () => (this.connected.value = false);
    source.addEventListener("row", (e) => this.row(JSON.parse((e as MessageEvent).data)));
    source.addEventListener("status", (e) => (this.status.value = JSON.parse((e as MessageEvent).data)));
    source.addEventListener("gap", () => this.redraw());
    source.addEventListener("incident", () => this.incidents.value++);
    source.addEventListener("action", () => this.actions.value++);
  }

  get closed(): boolean {
    return this.source?.readyState === EventSource.CLOSED;
  }

  private row(message: { step: number; values: Record<string, number | null> }): void {
    this.heard.value = Date.now();
    this.pending ??= new Map(this.last.value);
    for (const [name, value] of Object.entries(message.values ?? {})) this.pending.set(name, value);
    this.newest = message.step;
    if (!this.telling) this.telling = window.setTimeout(() => this.tell(), TELL_MS);
    if (!this.timer) this.timer = window.setTimeout(() => this.redraw(), REDRAW_MS);
  }

  private tell(): void {
    this.telling = 0;
    if (this.pending) this.last.value = this.pending;
    this.pending = null;
    this.step.value = this.newest;
  }

  private redraw(): void {
    this.timer = 0;
    if (!document.hidden) this.beat.value++;
  }
}
