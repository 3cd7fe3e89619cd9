// The frame around every page: the bar on top, the tabs of a run, keys, help.

import { useEffect, useState } from "preact/hooks";
import { ActionButton, Latest, usePaused } from "./actions";
import { useCell } from "./cell";
import { Dialog } from "./dialog";
import { ago, duration, grouped, short } from "./format";
import { RUNNING } from "./health";
import { Icon } from "./icons";
import { useKeys } from "./keys";
import { ALIGNMENT, Alignment } from "./pages/alignment";
import { Compare } from "./pages/compare";
import { Data } from "./pages/data";
import { Experts } from "./pages/experts";
import { IncidentPage, Incidents } from "./pages/incidents";
import { Inspect } from "./pages/inspect";
import { Lineage } from "./pages/lineage";
import { Overview } from "./pages/overview";
import { Precision } from "./pages/precision";
import { Runs, Status } from "./pages/runs";
import { dark } from "./palette";
import { go, link, useRoute } from "./route";
import { RunContext, type RunState, useRunState } from "./run";
import { setLang, t, useLang } from "./text";
import { switchTheme } from "./theme";

export function App() {
  const { path } = useRoute();
  const lang = useLang();
  const [help, setHelp] = useState(false);
  useKeys({
    "?": () => setHelp(true),
      "/": search,
      t: switchTheme,
      l: () => setLang(lang === "en" ? "zh" : "en"),
      g: () => go("#/"),
      Escape: () => go(path[0] === "run" && path.length > 2 ? link(path.slice(0, -1)) : "#/"),
  });
  const page = path[0] ?? "";
  return (
    <>
      <a class="skip" href="#main" onClick={(e) => { e.preventDefault(); document.getElementById("main")?.focus(); }}>{t("Skip to content")}</a>
      <Bar path={path} onHelp={() => setHelp(true)} />
      {page === "run" && path[1] ? <Run key={path[1]} id={path[1]} rest={path.slice(2)} /> : page === "compare" ? <Compare /> : <Runs />}
      {help && <Help onClose={() => setHelp(false)} />}
    </>
  );
}

function search(): void {
  const field = document.getElementById("search");
  if (field instanceof HTMLButtonElement) field.click();
  else field?.focus();
}

function Bar({ path, onHelp }: { path: string[]; onHelp: () => void }) {
  const isDark = useCell(dark);
  const lang = useLang();
  return (
    <header class="bar">
      <a class="brand" href="#/" title={t("All runs")}>
        <svg width="22" height="22" viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="8" /><path d="M5 19h5l3-10 5 16 3-9h6" /></svg>
        <b>deepseek</b> <span>monitor</span>
      </a>
      {path[0] === "run" && <nav class="crumbs" aria-label={t("Where you are")}><Icon name="right" size={12} /><a href={link(["run", path[1]])}>{path[1]?.replaceAll("~", "/")}</a></nav>}
      <span class="grow" />
      <button type="button" class="text-button" onClick={() => setLang(lang === "en" ? "zh" : "en")} lang={lang === "en" ? "zh" : "en"} aria-label={lang === "en" ? "切换到中文" : "Switch to English"}>{lang === "en" ? "中文" : "EN"}</button>
      <button type="button" class="icon-button" onClick={switchTheme} aria-label={t(isDark ? "Light theme" : "Dark theme")} title={t(isDark ? "Light theme" : "Dark theme")}><Icon name={isDark ? "sun" : "moon"} /></button>
      <button type="button" class="icon-button" onClick={onHelp} aria-label={t("Help")} title={t("Help (?)")}><Icon name="help" /></button>
    </header>
  );
}

const TABS: [string, string][] = [["", "Overview"], ["incidents", "Incidents"], ["experts", "Experts"], ["data", "Data"], ["precision", "Precision"], ["lineage", "Lineage"], ["alignment", "Alignment"], ["inspect", "Inspector"]];

/** Pages appear as their content does: by the server's word, or because such series are logged. */
function present(run: RunState, page: string): boolean {
  if (["", "incidents", "lineage"].includes(page)) return true;
  if (run.info?.pages?.includes(page)) return true;
  const test: Record<string, RegExp> = { experts: /^(expert|router)\//, data: /^data\/.+\//, precision: /^precision\//, alignment: ALIGNMENT };
  return test[page] ? [...run.series.keys()].some((n) => test[page].test(n)) : false;
}

function Run({ id, rest }: { id: string; rest: string[] }) {
  const run = useRunState(id);
  const page = rest[0] ?? "";
  const tabs = TABS.filter(([key]) => present(run, key) || key === page);
  useEffect(() => void (document.title = `${run.info?.name ?? id} · deepseek monitor`), [run.info?.name, id]);
  useKeys({ "+": () => zoom(run, 0.5), "-": () => zoom(run, 2), "0": () => run.zoom(), "[": () => pan(run, -0.5), "]": () => pan(run, 0.5), i: () => go(link(["run", id, "incidents"])) });
  const open = run.incidents.filter((x) => x.status === "open").length;
  return (
    <RunContext.Provider value={run}>
      <RunHead run={run} />
      <nav class="tabs" aria-label={t("Pages of the run")}>
        {tabs.map(([key, label]) => (
          <a key={key} href={link(key ? ["run", id, key] : ["run", id])} aria-current={key === page ? "page" : undefined}>
            {t(label)}{key === "incidents" && open > 0 && <span class="badge critical">{open}</span>}
          </a>
        ))}
      </nav>
      <main id="main" tabIndex={-1} class="run-page">
        {run.error ? <p class="failed" role="alert">{run.error.message}</p> : <Page page={page} rest={rest} />}
      </main>
    </RunContext.Provider>
  );
}

function Page({ page, rest }: { page: string; rest: string[] }) {
  if (page === "incidents") return rest[1] ? <IncidentPage key={rest[1]} id={rest[1]} /> : <Incidents />;
  if (page === "experts") return <Experts />;
  if (page === "data") return <Data />;
  if (page === "precision") return <Precision />;
  if (page === "lineage") return <Lineage />;
  if (page === "alignment") return <Alignment />;
  if (page === "inspect") return <Inspect />;
  return <Overview />;
}

function zoom(run: RunState, factor: number): void {
  const [a, b] = [run.view.start ?? run.extent[0], run.view.stop ?? run.extent[1]];
  const [middle, half] = [(a + b) / 2, ((b - a) / 2) * factor];
  if (half * 2 >= run.extent[1]) run.zoom();
  else run.zoom(Math.max(0, Math.floor(middle - half)), Math.ceil(middle + half));
}

function pan(run: RunState, share: number): void {
  const [a, b] = [run.view.start ?? run.extent[0], run.view.stop ?? run.extent[1]];
  const from = Math.min(Math.max(0, a + (b - a) * share), run.extent[1] - (b - a));
  run.zoom(Math.round(from), Math.round(from + b - a));
}

function RunHead({ run }: { run: RunState }) {
  const step = useCell(run.live.step) ?? run.info?.step ?? null;
  const connected = useCell(run.live.connected);
  const speed = useCell(run.live.last).get("time/step") ?? run.series.get("time/step")?.last ?? null;
  const { info } = run;
  const total = info?.total_steps ?? null;
  const share = step !== null && total ? Math.min(1, step / total) : null;
  const running = [...RUNNING, "paused"].includes(info?.status ?? "");
  const left = running && speed && total && step !== null ? (total - step) * speed : null;
  const paused = usePaused() || info?.status === "paused";
  return (
    <div class="run-head">
      <div class="run-title">
        <h1>{info?.name ?? run.id}</h1>
        {info && <Status status={running && paused ? "paused" : info.status} />}
        {running && connected && <span class="live" title={t("Connected: rows arrive as the run writes them")}><Icon name="live" size={14} /><span class="sr">{t("live")}</span></span>}
      </div>
      <dl class="run-facts">
        <div><dt>{t("Step")}</dt><dd>{grouped(step)}{total ? <small> / {grouped(total)}</small> : null}</dd></div>
        {left !== null && <div><dt>{t("Left")}</dt><dd>{duration(left)}</dd></div>}
        {info?.parameters ? <div><dt>{t("Parameters")}</dt><dd>{short(info.parameters)}</dd></div> : null}
        {info?.device ? <div><dt>{t("Device")}</dt><dd>{info.device}</dd></div> : null}
        {info?.updated ? <div><dt>{t("Updated")}</dt><dd>{ago(info.updated)}</dd></div> : null}
      </dl>
      {running && (
        <div class="run-actions">
          <ActionButton name="checkpoint" label="Checkpoint" />
          <ActionButton name={paused ? "continue" : "pause"} />
          <ActionButton name="stop" />
        </div>
      )}
      <Latest />
      {share !== null && <div class="progress head" role="img" aria-label={t("{x} done", { x: `${Math.round(share * 100)} %` })}><i style={{ width: `${share * 100}%` }} /></div>}
    </div>
  );
}

const KEYS: [string, string][] = [
  ["j k", "Next and previous run"], ["Enter", "Open"], ["x", "Choose a run to compare"], ["c", "Compare the chosen runs"],
  ["/", "Search runs or series"], ["+ −", "Zoom in and out"], ["[ ]", "Earlier, later"], ["0", "Show the whole run"],
  ["← →", "Previous and next incident; in a chart: move the cursor"], ["i", "Incidents"], ["Esc", "Back"], ["g", "All runs"], ["t", "Dark or light"], ["l", "中文 / English"], ["?", "This help"],
];

function Help({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title={t("Keys and how to read the page")} onClose={onClose}>
      <dl class="keys">{KEYS.map(([k, what]) => <div key={k}><dt>{k.split(" ").map((x) => <kbd key={x}>{x}</kbd>)}</dt><dd>{t(what)}</dd></div>)}</dl>
      <ul class="how">
        <li>{t("Drag in a chart to zoom; every chart follows and reads that part at full resolution. A double click shows all.")}</li>
        <li>{t("The pale stroke is every value between the smallest and largest of each bucket; the strong line is smoothed. A spike of one step is always drawn, with a dot.")}</li>
        <li>{t("Pins are incidents: press one to see what moved first, the cause, and what to do.")}</li>
      </ul>
    </Dialog>
  );
}
