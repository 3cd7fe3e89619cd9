// The server's routes (OpenAI's, deepseek/serve/server), its errors as kinds the page can act on, and the key.

import { Cell } from "../../src/cell";
import { events } from "./sse";

export interface Model {
  id: string;
  parent?: string | null; // of a LoRA adapter: the model it changes
  max_model_len?: number;
  // what this project's server also tells
  chat?: boolean; // whether it has a chat template
  parameters?: number;
  experts?: number;
  expert_layers?: number[];
  hybrid_layers?: number[];
}

/** What went wrong, by what can be done about it. */
export type Trouble =
  | "key" // 401, 403: ask for a key
  | "busy" // 429: wait as long as the server says
  | "starting" // 503: ask /ready until it is
  | "lost" // the connection ended inside the answer: keep it, offer to go on
  | "unreached" // no answer at all
  | "refused" // the request itself is wrong
  | "server"; // the server's own fault

export class Failure extends Error {
  constructor(
    readonly trouble: Trouble,
    message: string,
    readonly status = 0,
    readonly retryAfter = 0, // seconds
    readonly code = "",
  ) {
    super(message);
  }
}

const KEY = "deepseek.chat.key";

function keptKey(): string {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** The API key: in this tab only, gone when it is closed. */
export const key = new Cell(keptKey());

export function setKey(text: string): void {
  key.value = text.trim();
  try {
    if (key.value) sessionStorage.setItem(KEY, key.value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // storage is closed to the page: the key lives until it is reloaded
  }
}

/** A refused key: the page asks for one, and then asks again. */
export const keyWanted = new Cell<{ why: string; again: () => void } | null>(null);

const headers = (): Record<string, string> => (key.value ? { Authorization: `Bearer ${key.value}` } : {});

async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers: { ...headers(), ...(init.headers as Record<string, string>) } });
  } catch (error) {
    if ((error as Error).name === "AbortError") throw error;
    throw new Failure("unreached", (error as Error).message);
  }
  if (response.ok) return response;
  throw await failureOf(response);
}

async function failureOf(response: Response): Promise<Failure> {
  const body = await response.text().catch(() => "");
  let [said, code] = [body.slice(0, 500), ""];
  try {
    const { error, detail, reason } = JSON.parse(body);
    said = error?.message ?? (typeof error === "string" ? error : null) ?? detail ?? reason ?? said;
    code = String(error?.code ?? "");
  } catch {
    // not JSON: the text itself is the message
  }
  const { status } = response;
  return new Failure(troubleOf(status), said || response.statusText || `HTTP ${status}`, status, waitOf(response.headers.get("Retry-After")), code);
}

export function troubleOf(status: number): Trouble {
  if (status === 401 || status === 403) return "key";
  if (status === 429) return "busy";
  if (status === 503) return "starting";
  return status >= 500 ? "server" : "refused";
}

/** The status that an error inside a stream would have had, by its type. */
const STATUS: Record<string, number> = { rate_limit_error: 429, service_unavailable_error: 503, authentication_error: 401, invalid_request_error: 400 };

/** Retry-After is a number of seconds or a date (RFC 9110, 10.2.3). */
function waitOf(header: string | null): number {
  if (!header) return 0;
  const seconds = /^\s*\d+(\.\d+)?\s*$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(Math.max(seconds, 0), 3600) : 0;
}

export async function models(): Promise<Model[]> {
  const answer = (await (await ask("v1/models")).json()) as { data?: Model[] };
  return answer.data ?? [];
}

/** Whether the server says it can answer now, and if not, why. */
export async function ready(): Promise<{ ready: boolean; why: string }> {
  try {
    const response = await fetch("ready", { cache: "no-store" });
    if (response.ok) return { ready: true, why: "" };
    return { ready: false, why: (await failureOf(response)).message };
  } catch (error) {
    return { ready: false, why: (error as Error).message };
  }
}

/** The parsed events of a streamed answer; ends after ``[DONE]``, and throws ``lost`` when it ends before. */
export async function* stream(path: string, body: unknown, signal: AbortSignal): AsyncGenerator<Record<string, unknown>> {
  const init = { method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json", Accept: "text/event-stream" } };
  const response = await ask(path, init);
  if (!response.body) throw new Failure("lost", "the answer has no body");
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data) as { error?: { message?: string; code?: number | string; status?: number; type?: string } };
      if (event.error) {
        const status = Number(event.error.status ?? event.error.code) || STATUS[event.error.type ?? ""] || 500;
        throw new Failure(troubleOf(status), event.error.message ?? "", status);
      }
      yield event as Record<string, unknown>;
    }
  } catch (error) {
    if (error instanceof Failure || signal.aborted || (error as Error).name === "AbortError") throw error;
    throw new Failure("lost", (error as Error).message);
  }
  throw new Failure("lost", "");
}
