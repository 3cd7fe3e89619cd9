// The data the run really trains on: each source's loss, share, drift and make-up, as a table and over time.

import { useCell } from "../cell";
import { figures, percent } from "../format";
import { line } from "../palette";
import { Panel } from "../panel";
import { useRun } from "../run";
import { t } from "../text";
import { Timeline } from "../timeline";

const PSI_SOME = 0.1; // the usual reading of the population stability index: below 0.1 stable, above 0.25 shifted
const PSI_MUCH = 0.25;

export function Data() {
  const run = useRun();
  const last = useCell(run.live.last);
  const names = [...run.series.keys()].filter((n) => n.startsWith("data/") && n.split("/").length > 2);
  const sources = [...new Set(names.map((n) => n.slice(5, n.lastIndexOf("/"))))].sort();
  const value = (source: string, key: string) => last.get(`data/${source}/${key}`) ?? run.series.get(`data/${source}/${key}`)?.last ?? null;
  if (!sources.length) return <p class="empty">{t("This run logs nothing about its data.")}</p>;
  const chart = (key: string, title: string, log = false) => {
    const have = sources.filter((s) => run.series.has(`data/${s}/${key}`)).slice(0, 8);
    return have.length ? <Panel key={key} title={t(title)} log={log} names={have.map((s) => `data/${s}/${key}`)} labels={Object.fromEntries(have.map((s) => [`data/${s}/${key}`, s]))} smooth={0.006} bounds={key === "psi" ? [0, PSI_MUCH] : undefined} /> : null;
  };
  return (
    <section class="data">
      <Timeline series={run.series.has("train/loss") ? "train/loss" : names[0]} />
      <div class="card table-card" tabIndex={0} role="group" aria-label={t("Sources")}>
        <table>
          <thead><tr><th>{t("Source")}</th><th>{t("Share")}</th><th class="n">{t("Loss")}</th><th>{t("Drift (PSI)")}</th><th class="n">{t("Length")}</th><th class="n">{t("Token entropy")}</th><th class="n">{t("Duplicates")}</th></tr></thead>
          <tbody>
            {sources.map((s, i) => {
              const psi = value(s, "psi");
              const state = psi === null ? "none" : psi > PSI_MUCH ? "critical" : psi > PSI_SOME ? "warning" : "ok";
              return (
                <tr key={s}>
                  <td><i class="key" style={{ background: line(i) }} aria-hidden="true" /> {s}</td>
                  <td><span class="bar"><i style={{ width: `${(value(s, "share") ?? 0) * 100}%`, background: line(i) }} /></span> {percent(value(s, "share"))}</td>
                  <td class="n">{figures(value(s, "loss"))}</td>
                  <td><span class={`state ${state}`}>{figures(psi, 2)} <small>{t({ ok: "stable", warning: "some shift", critical: "shifted", none: "" }[state] ?? "")}</small></span></td>
                  <td class="n">{figures(value(s, "length"))}</td>
                  <td class="n">{figures(value(s, "entropy"), 3)}</td>
                  <td class="n">{percent(value(s, "duplicates"))}</td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <div class="panels two">
        {chart("loss", "Loss per source")}
        {chart("psi", "Drift per source")}
        {chart("share", "Share of the batch")}
        {chart("length", "Document length")}
        {chart("entropy", "Token entropy")}
        {chart("duplicates", "Duplicates")}
      </div>
    </section>
  );
}
