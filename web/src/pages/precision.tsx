// Number formats: loss scale, values lost, and every switch with its reason.

import { type LineageItem, runPath } from "../api";
import { clock, duration, figures, grouped } from "../format";
import { Panel } from "../panel";
import { useGet, useRun } from "../run";
import { t, word } from "../text";
import { Timeline } from "../timeline";

export function Precision() {
  const run = useRun();
  const { value } = useGet<LineageItem[]>(runPath(run.id, "/events?name=precision&limit=500"), 0);
  const names = [...run.series.keys()].filter((n) => n.startsWith("precision/"));
  const switches = value ?? [];
  return (
    <section class="precision">
      <Timeline series="train/loss" />
      <div class="panels two">
        {names.map((n) => <Panel key={n} names={[n]} log={n.endsWith("scale")} smooth={0} />)}
        {run.series.has("train/grad_norm") && <Panel names={["train/grad_norm"]} title={t("Gradient norm")} log />}
      </div>
      <div class="card table-card" tabIndex={0} role="group" aria-label={t("Switches")}>
        <table>
          <thead><tr><th class="n">{t("Step")}</th><th>{t("Time")}</th><th>{t("What")}</th></tr></thead>
          <tbody>
            {switches.map((e, i) => (
              <tr key={i}><td class="n">{grouped(e.step ?? null)}</td><td>{clock(e.time)}</td><td>{said(e)}</td></tr>
            ))}
            {!switches.length && <tr><td colSpan={3} class="note">{t("No switch of precision so far.")}</td></tr>}
          </tbody>
        </table>
      </div>
    </section>
  );
}

const SILENT = ["event", "kind", "step", "time", "id", "name", "path", "run", "directory", "stall_seconds", "incident"];

/** A run's first event has a page of facts; of the others everything but what its line says already. */
const tells = (item: LineageItem, key: string) =>
  (item.kind ?? item.event) === "run" ? ["command", "device", "resumed_from"].includes(key) : !SILENT.includes(key);

export function said(item: LineageItem): string {
  return Object.entries(item)
    .filter(([k, v]) => tells(item, k) && v !== null && v !== undefined && v !== "")
    .filter(([, v]) => typeof v !== "object" || (Array.isArray(v) && v.length < 5 && v.every((x) => typeof x !== "object")))
    .slice(0, 6)
    .map(([k, v]) => `${word(k.replaceAll("_", " "))} ${Array.isArray(v) ? v.join("–") : typeof v === "number" ? (k === "seconds" ? duration(v) : figures(v)) : String(v)}`)
    .join(" · ");
}
