// Six tiles: is the run well, and if not, why. The colour is the detectors' judgement (open incidents); the words
// are measured numbers. A tile whose series are not logged says so and stays grey.

import { useEffect, useState } from "preact/hooks";
import type { Incident, Window } from "./api";
import { useCell } from "./cell";
import { ago, bytes, figures, NONE, percent, short } from "./format";
import { Icon, severityIcon } from "./icons";
import { link } from "./route";
import { type RunState, useRun, useWindows } from "./run";
import { t, titleOf } from "./text";

type State = "ok" | "warning" | "critical" | "none";
interface Tile {
  key: string;
  label: string;
  value: string;
  unit: string;
  why: string;
  state: State;
  href: string;
}

const KINDS: Record<string, string[]> = {
  loss: ["loss_spike", "gradient_spike", "divergence", "plateau"],
  speed: ["slow", "stall", "hang", "slow_rank"],
  data: ["data_drift"],
  memory: ["memory"],
  experts: ["dead_expert", "router_collapse"],
  precision: ["precision", "nan"],
};
const TREND = ["train/loss", "train/tokens_per_second"];
export const RUNNING = ["running", "training", "live"];

export function Health() {
  const run = useRun();
  const last = useCell(run.live.last);
  const { windows } = useWindows(TREND.filter((n) => run.series.has(n)), { off: !run.info, points: 600, start: fifth(run.extent[1]), whole: true });
  useClock(5000);
  const value = (name: string) => last.get(name) ?? run.series.get(name)?.last ?? null;
  const tiles = [loss, speed, data, memory, experts, precision].map((make) => make(run, value, windows));
  return (
    <nav class="health" aria-label={t("Health")}>
      {tiles.map((x) => (
        <a key={x.key} class={`tile ${x.state}`} href={x.href}>
          <span class="tile-label">
            {t(x.label)}
            <span class="tile-state">
              <Icon name={severityIcon(x.state)} size={13} />
              <span class="sr">{t({ ok: "calm", warning: "warning", critical: "critical", none: "not logged" }[x.state])}</span>
            </span>
          </span>
          <span class="tile-value">
            {x.value} <small>{x.unit}</small>
          </span>
          <span class="tile-why">{x.why}</span>
        </a>
      ))}
    </nav>
  );
}

function useClock(ms: number): void {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((n) => n + 1), ms);
    return () => clearInterval(timer);
  }, []);
}

/** Where the last fifth of a run begins, rounded so that it does not move with every step. */
function fifth(last: number): number {
  const unit = 10 ** Math.max(0, Math.floor(Math.log10(Math.max(last, 1))) - 1);
  return Math.floor((last * 0.8) / unit) * unit;
}

type Value = (name: string) => number | null;

/** The tile's colour and, when something is open, what and where; else the calm words given. */
function judged(run: RunState, key: string, calm: string, known: boolean, page: string): Pick<Tile, "key" | "why" | "state" | "href"> {
  const open = run.incidents.filter((i) => i.status === "open" && KINDS[key].includes(i.kind) && i.severity !== "info");
  const worst: Incident | undefined = open.sort((a, b) => Number(b.severity === "critical") - Number(a.severity === "critical") || b.step - a.step)[0];
  const home = page ? ["run", run.id, page] : ["run", run.id];
  if (!worst) return { key, why: calm, state: known ? "ok" : "none", href: link(home) };
  const more = open.length > 1 ? ` ${t("and {n} more", { n: open.length - 1 })}` : "";
  const href = link(["run", run.id, "incidents", worst.id]);
  return { key, why: titleOf(worst.title) + more, state: worst.severity as State, href };
}

const missing = (run: RunState) => (run.listed ? t("not logged by this run") : "…");

function loss(run: RunState, value: Value, windows: Map<string, Window>): Tile {
  const now = value("train/loss") ?? run.info?.loss ?? null;
  const slope = trend(windows.get("train/loss"));
  const words = slope === null ? t("steady") : t(slope < 0 ? "falling {x} over the last fifth" : "rising {x} over the last fifth", { x: percent(Math.abs(slope)) });
  return { label: "Loss", value: figures(now), unit: "nats", ...judged(run, "loss", now === null ? missing(run) : words, now !== null, "") };
}

function speed(run: RunState, value: Value, windows: Map<string, Window>): Tile {
  const now = value("train/tokens_per_second") ?? run.info?.tokens_per_second ?? null;
  const usual = median(windows.get("train/tokens_per_second"));
  const ratio = now !== null && usual ? now / usual - 1 : 0;
  const mfu = value("train/mfu");
  const calm = Math.abs(ratio) < 0.03 ? t("at its median") : t(ratio < 0 ? "{x} below its median" : "{x} above its median", { x: percent(Math.abs(ratio)) });
  const words = mfu === null ? calm : `${calm} · MFU ${percent(mfu)}`;
  const tile = { label: "Speed", value: short(now), unit: "tok/s", ...judged(run, "speed", now === null ? missing(run) : words, now !== null, "") };
  const quiet = silence(run, value("time/step"));
  return quiet && tile.state === "ok" ? { ...tile, state: "warning", why: t("no step heard since {x}", { x: quiet }) } : tile;
}

/** Since when a running run has said nothing, if that is longer than 20 of its steps and a minute. */
function silence(run: RunState, step: number | null): string | null {
  const heard = Math.max(run.live.heard.value / 1000, run.info?.updated ?? 0);
  if (!RUNNING.includes(run.info?.status ?? "") || !heard) return null;
  return Date.now() / 1000 - heard > Math.max(60, 20 * (step ?? 0)) ? ago(heard) : null;
}

function data(run: RunState, value: Value): Tile {
  const sources = [...run.series.keys()].filter((n) => /^data\/.+\/psi$/.test(n));
  const drift = sources.map((n) => [value(n) ?? 0, n.slice(5, -4)] as const).sort((a, b) => b[0] - a[0])[0];
  const wait = value("time/data");
  const step = value("time/step");
  const waits = wait !== null && step ? t("{x} of a step waits for data", { x: little(wait / step) }) : "";
  const drifts = drift ? t("most drift: {x}", { x: drift[1] }) : "";
  const known = Boolean(waits || drifts);
  const shown = drift ? figures(drift[0], 2) : wait !== null && step ? little(wait / step) : NONE;
  const unit = drift ? "PSI" : known ? t("waiting") : "";
  return { label: "Data", value: shown, unit, ...judged(run, "data", known ? [drifts, waits].filter(Boolean).join(" · ") : missing(run), known, run.info?.pages.includes("data") ? "data" : "") };
}

function memory(run: RunState, value: Value): Tile {
  const now = value("memory/allocated") || value("memory/rss");
  const held = value("memory/reserved");
  const words = held ? t("{x} reserved", { x: bytes(held) }) : value("memory/allocated") ? t("allocated") : t("resident");
  const [number, unit] = bytes(now).split("\u202f");
  return { label: "Memory", value: number, unit: unit ?? "", ...judged(run, "memory", now === null ? missing(run) : words, now !== null, "") };
}

function experts(run: RunState, value: Value): Tile {
  const layers = [...run.series.keys()].filter((n) => /^router\/\d+\/dead$/.test(n));
  const dead = layers.reduce((sum, n) => sum + (value(n) ?? 0), 0);
  const entropy = value("train/router_entropy");
  const violation = value("train/max_vio");
  const known = layers.length > 0 || entropy !== null || violation !== null;
  const words = known ? [violation !== null && t("max violation {x}", { x: figures(violation, 3) }), layers.length && t("{n} dead", { n: dead })].filter(Boolean).join(" · ") : missing(run);
  return { label: "Experts", value: figures(entropy, 3), unit: entropy === null ? "" : t("entropy"), ...judged(run, "experts", words, known, run.info?.pages.includes("experts") ? "experts" : "") };
}

function precision(run: RunState, value: Value): Tile {
  const lost = value("precision/nonfinite");
  const scale = value("precision/loss_scale");
  const switches = value("precision/switches");
  const kind = String(run.info?.facts?.dtype ?? run.info?.facts?.precision ?? "");
  const known = Boolean(kind) || lost !== null || scale !== null;
  const words = [lost !== null && t("non-finite values: {n}", { n: short(lost) }), switches !== null && t("switches: {n}", { n: switches }), scale !== null && `${t("scale")} ${short(scale)}`].filter(Boolean).join(" · ");
  return { label: "Precision", value: kind || figures(lost), unit: "", ...judged(run, "precision", words || (known ? t("no trouble seen") : missing(run)), known, run.info?.pages.includes("precision") ? "precision" : "") };
}

/** Relative change from the first to the last quarter of a window, or null when it is within its own noise. */
export function trend(window: Window | undefined): number | null {
  const values = (window?.mean ?? []).filter((x): x is number => x !== null);
  if (values.length < 16) return null;
  const quarter = Math.floor(values.length / 4);
  const [a, b] = [middle(values.slice(0, quarter)), middle(values.slice(-quarter))];
  const noise = middle(values.slice(0, quarter).map((x) => Math.abs(x - a))) / Math.sqrt(quarter);
  return Math.abs(b - a) < 3 * noise ? null : (b - a) / Math.abs(a || 1);
}

const middle = (values: number[]) => [...values].sort((a, b) => a - b)[values.length >> 1];
const median = (window: Window | undefined) => {
  const values = (window?.mean ?? []).filter((x): x is number => x !== null);
  return values.length ? middle(values) : null;
};

/** A share nobody minds says so, without digits. */
const little = (share: number) => (share > 0 && share < 0.001 ? `<${percent(0.001)}` : percent(share));
