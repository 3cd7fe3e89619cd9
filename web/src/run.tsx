// What every page of one run shares: its facts, its series, its incidents, what arrives live, and the window of steps in view.

import { createContext } from "preact";
import { useCallback, useContext, useEffect, useMemo, useRef, useState } from "preact/hooks";
import { get, type Checkpoint, type Incident, type LineageItem, lineageOf, readSeries, type RunInfo, runPath, type SeriesInfo, type Window } from "./api";
import { useCell } from "./cell";
import { Live } from "./live";
import type { Mark } from "./plot";
import { setQuery, useRoute } from "./route";

export interface RunState {
  id: string;
  info: RunInfo | null;
  error: Error | null;
  series: Map<string, SeriesInfo>;
  listed: boolean; // whether the list of series has arrived
  incidents: Incident[];
  lineage: LineageItem[];
  live: Live;
  view: { start?: number; stop?: number };
  zoom: (start?: number, stop?: number) => void;
  extent: [number, number];
  reload: () => void;
}

export const RunContext = createContext<RunState>(null as unknown as RunState);
export const useRun = () => useContext(RunContext);

/** A GET that repeats when ``again`` changes; the last good answer stays while the next is on its way. */
export function useGet<T>(path: string | null, again: unknown = 0): { value: T | null; error: Error | null; busy: boolean } {
  const [state, setState] = useState<{ path: string | null; value: T | null; error: Error | null }>({ path: null, value: null, error: null });
  useEffect(() => {
    let alive = true;
    if (path === null) return;
    get<T>(path).then(
      (value) => alive && setState({ path, value, error: null }),
      (error) => alive && setState((s) => ({ path, value: s.path === path ? s.value : null, error })),
    );
    return () => void (alive = false);
  }, [path, again]);
  const current = state.path === path;
  return { value: current ? state.value : null, error: current ? state.error : null, busy: !current };
}

export function useRunState(id: string): RunState {
  const live = useMemo(() => new Live(id), [id]);
  const { query } = useRoute();
  const [again, setAgain] = useState(0);
  const newIncidents = useCell(live.incidents);
  const news = useCell(live.status);
  const actions = useCell(live.actions);
  useEffect(() => live.open(), [live]);

  const beats = useCell(live.beat) >> 3; // checkpoints and the like: looked for every eighth redraw
  const known = useRef<string | null>(null);
  const changed = news && known.current && news.status !== known.current ? news.status : "";
  const told = useGet<RunInfo>(runPath(id), `${again}.${changed}.${beats}`);
  if (told.value) known.current = told.value.status;
  const info = { ...told, value: useMemo(() => (told.value ? { ...told.value, ...(news?.error ? {} : news) } : null), [told.value, news]) };
  const list = useGet<SeriesInfo[]>(runPath(id, "/series"), `${again}.${beats}`);
  const incidents = useGet<Incident[]>(runPath(id, "/incidents"), `${again}.${newIncidents}.${actions}`);
  const lineage = useGet<Parameters<typeof lineageOf>[0]>(runPath(id, "/lineage"), `${again}.${actions}.${beats}`);
  const series = useMemo(() => new Map((list.value ?? []).map((s) => [s.name, s])), [list.value]);

  const number = (key: string) => (query.get(key) ? Number(query.get(key)) : undefined);
  const [start, stop] = [number("from"), number("to")];
  const zoom = useCallback((a?: number, b?: number) => {
    const whole = a === undefined && b === undefined;
    const [x, y] = [Math.max(0, a ?? 0), Math.max((a ?? 0) + 2, b ?? 0)];
    setQuery({ from: whole ? undefined : String(x), to: whole || b === undefined ? undefined : String(y) });
  }, []);
  const last = Math.max(live.step.value ?? 0, info.value?.step ?? 0, 1);
  const extent = useMemo<[number, number]>(() => [0, last], [last]);
  const lines = useMemo(() => lineageOf(lineage.value), [lineage.value]);
  const view = useMemo(() => ({ start, stop }), [start, stop]);
  const reload = useCallback(() => setAgain((n) => n + 1), []);
  const found = incidents.value ?? NOTHING;
  return useMemo(
    () => ({ id, info: info.value, error: info.error, series, listed: list.value !== null, incidents: found, lineage: lines, live, view, zoom, extent, reload }),
    [id, info.value, info.error, series, list.value !== null, found, lines, live, view, zoom, extent, reload],
  );
}

const NOTHING: Incident[] = [];

/** The windows of several series in the view, read again when the view moves or, while it follows, when rows come. */
export function useWindows(names: string[], options: { points?: number; start?: number; stop?: number; off?: boolean; whole?: boolean } = {}) {
  const run = useRun();
  const beat = useCell(run.live.beat);
  const start = options.start ?? (options.whole ? undefined : run.view.start);
  const stop = options.stop ?? (options.whole ? undefined : run.view.stop);
  const points = options.points ?? 1500;
  const follows = stop === undefined || stop >= run.extent[1];
  const key = JSON.stringify([run.id, names, start, stop, points]);
  const [found, setFound] = useState<{ key: string; windows: Map<string, Window>; error: Error | null }>({ key: "", windows: new Map(), error: null });
  useEffect(() => {
    if (options.off || !names.length) return;
    let alive = true;
    Promise.all(names.map((n) => readSeries(run.id, n, { start, stop, points }))).then(
      (all) => {
        const windows = new Map<string, Window>();
        all.forEach((w, i) => w && w.step.length && windows.set(names[i], w));
        if (alive) setFound({ key, windows, error: null });
      },
      (error) => alive && setFound({ key, windows: new Map(), error }),
    );
    return () => void (alive = false);
  }, [key, follows ? beat : 0, options.off]);
  return { windows: found.windows, error: found.error, busy: found.key !== key };
}

export function checkpoints(run: RunState): Checkpoint[] {
  return run.info?.checkpoints ?? [];
}

export function resumes(run: RunState): number[] {
  return run.lineage.filter((x) => (x.kind ?? x.event) === "resume" && typeof x.step === "number").map((x) => x.step as number);
}

export function useMarks(withCheckpoints = false): Mark[] {
  const run = useRun();
  return useMemo(
    () => [
      ...(withCheckpoints ? checkpoints(run).map((c): Mark => ({ step: c.step, kind: "checkpoint" })) : []),
      ...resumes(run).map((step): Mark => ({ step, kind: "resume" })),
      ...run.incidents.filter((i) => i.status !== "resolved").map((i): Mark => ({ step: i.step, kind: i.severity })),
    ],
    [run.incidents, run.info?.checkpoints, run.lineage, withCheckpoints],
  );
}
