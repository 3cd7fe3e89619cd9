// What can be done to a run: said before, asked once, followed until the run answers.

import { useEffect, useState } from "preact/hooks";
import { type Command, type Incident, get, runPath, send } from "./api";
import { useCell } from "./cell";
import { Dialog } from "./dialog";
import { ago, grouped } from "./format";
import { Icon } from "./icons";
import { useRun } from "./run";
import { t, word } from "./text";

export interface Action {
  action: string;
  label: string;
  icon: string;
  effect: string; // what happens when I press
  danger?: boolean;
}

export const ACTIONS: Record<string, Action> = {
  rollback_skip: {
    action: "rollback_skip",
    label: "Roll back and skip",
    icon: "rewind",
    effect: "The run loads its last checkpoint before the incident, leaves out the batches around it, and goes on from there. Steps after that checkpoint are trained again; nothing on disk is deleted.",
    danger: true,
  },
  quarantine: {
    action: "quarantine",
    label: "Quarantine",
    icon: "shield",
    effect: "The documents of this batch are put on the run's exclusion list: they are not drawn again from the next batch on, also after a resume. The corpus itself is not changed.",
  },
  replay: {
    action: "replay",
    label: "Replay",
    icon: "replay",
    effect: "The step is computed again from the checkpoint before it with the same batch, beside the run. Equal numbers mean the data or the model did it; different ones point at the hardware. The run's own weights are not touched.",
  },
  checkpoint: { action: "checkpoint", label: "Checkpoint now", icon: "save", effect: "The run writes a checkpoint after the step it is in, then goes on." },
  pause: { action: "pause", label: "Pause", icon: "pause", effect: "The run stops after the step it is in and waits, weights in memory, until you press Continue." },
  continue: { action: "continue", label: "Continue", icon: "play", effect: "A paused run goes on with the next step." },
  stop: { action: "stop", label: "Stop", icon: "stop", effect: "The run writes a checkpoint after the step it is in and ends. `deepseek` resumes it later from there.", danger: true },
  capture: { action: "capture", label: "Capture 3 steps", icon: "camera", effect: "The profiler records the next three steps. They run slower while it does; the trace then opens in the viewer with a verdict on the bottleneck." },
};

export function ActionButton({ name, incident, values, label, detail }: { name: string; incident?: Incident; values?: Record<string, unknown>; label?: string; detail?: string }) {
  const run = useRun();
  const action = ACTIONS[name];
  const [asking, setAsking] = useState(false);
  if (!action) return null;
  return (
    <>
      <button type="button" class={action.danger ? "button danger" : "button"} onClick={() => setAsking(true)} title={t(action.effect)} data-action={name}>
        <Icon name={action.icon} /> {t(label ?? action.label)}
      </button>
      {asking && (
        <Confirm
          action={action}
          incident={incident}
          detail={detail}
          onClose={() => setAsking(false)}
          values={values ?? {}}
          onYes={async (chosen) => {
            await send<Command>("POST", runPath(run.id, "/actions"), { action: name, incident: incident?.id, arguments: chosen });
            run.live.actions.value++;
            setAsking(false);
          }}
        />
      )}
    </>
  );
}

function Confirm({ action, incident, detail, values, onYes, onClose }: { action: Action; incident?: Incident; detail?: string; values: Record<string, unknown>; onYes: (values: Record<string, unknown>) => Promise<void>; onClose: () => void }) {
  const [busy, setBusy] = useState(false);
  const [failed, setFailed] = useState<string | null>(null);
  const [skip, setSkip] = useState(values.skip as [number, number] | undefined);
  const wrong = skip && !(skip[0] >= 1 && skip[1] >= skip[0]);
  const press = async () => {
    setBusy(true);
    try {
      await onYes(skip ? { ...values, skip } : values);
    } catch (error) {
      setFailed((error as Error).message);
      setBusy(false);
    }
  };
  return (
    <Dialog title={`${t(action.label)}?`} onClose={onClose}>
      <p class="effect">{t(action.effect)}</p>
      {skip && (
        <p class="skip-steps">
          {t("Leave out the batches of steps")}{" "}
          {([0, 1] as const).map((i) => (
            <input
              key={i}
              type="number"
              min={1}
              value={skip[i]}
              aria-label={t(i ? "Last step left out" : "First step left out")}
              onInput={(e) => setSkip(skip.map((x, k) => (k === i ? Math.round(Number((e.target as HTMLInputElement).value)) : x)) as [number, number])}
            />
          ))}
        </p>
      )}
      {detail && <p class="effect-detail">{detail}</p>}
      {incident && <p class="note">{t("Incident at step {step}: {title}", { step: grouped(incident.step), title: incident.title })}</p>}
      {failed && <p class="failed" role="alert">{failed}</p>}
      <footer>
        <button type="button" class="button" onClick={onClose}>{t("Not now")}</button>
        <button type="button" class={action.danger ? "button danger solid" : "button primary"} disabled={busy || wrong} onClick={press} data-confirm>
          {busy ? t("Sending…") : t(action.label)}
        </button>
      </footer>
    </Dialog>
  );
}

/** The commands of a run, newest first, with what the run answered; refreshed by the stream and, while one waits, by a clock. */
export function useCommands(): Command[] {
  const run = useRun();
  const news = useCell(run.live.actions);
  const [list, setList] = useState<Command[]>([]);
  const [tick, setTick] = useState(0);
  const waits = list.some((c) => !["done", "failed", "refused", "error"].includes(c.status));
  useEffect(() => {
    let alive = true;
    get<Command[]>(runPath(run.id, "/actions")).then((x) => alive && setList([...x].sort((a, b) => Number(b.id) - Number(a.id))), () => undefined);
    return () => void (alive = false);
  }, [run.id, news, tick]);
  useEffect(() => {
    if (!waits) return;
    const timer = setTimeout(() => setTick((n) => n + 1), 1500);
    return () => clearTimeout(timer);
  }, [waits, tick, list]);
  return list;
}

/** Whether the newest of the pauses and continuations that were carried out was a pause. */
export function usePaused(): boolean {
  const newest = useCommands().find((c) => c.status === "done" && ["pause", "continue", "rollback_skip", "stop"].includes(c.action));
  return newest?.action === "pause";
}

const SHOWN_S = 90;

/** The newest command of the run's own buttons, for a while: pressing without an answer would leave one in doubt. */
export function Latest() {
  const [newest] = useCommands().filter((c) => !c.arguments?.incident && !c.incident);
  const age = newest ? Date.now() / 1000 - (newest.finished ?? newest.created ?? newest.time ?? 0) : Infinity;
  if (!newest || age > SHOWN_S) return null;
  return <Commands only={(c) => c.id === newest.id} />;
}

export function Commands({ only }: { only?: (c: Command) => boolean }) {
  const list = useCommands().filter((c) => !only || only(c)).slice(0, 8);
  if (!list.length) return null;
  return (
    <ol class="commands" aria-live="polite" aria-label={t("Actions and their results")}>
      {list.map((c) => (
        <li key={c.id} class={`command ${c.status}`}>
          <span class="command-state">{word(c.status)}</span>
          <b>{word(ACTIONS[c.action]?.label ?? c.action)}</b>
          <span class="command-result">{answered(c.result)}</span>
          <small>{ago(c.time ?? c.created)}</small>
        </li>
      ))}
    </ol>
  );
}

export function answered(result: unknown): string {
  if (result === null || result === undefined) return "";
  if (typeof result !== "object") return String(result);
  const { text, detail, message, error, ...rest } = result as Record<string, unknown>;
  const said = text ?? detail ?? message ?? error;
  const more = Object.entries(rest).filter(([, v]) => typeof v !== "object").map(([k, v]) => `${k} ${v}`).join(" · ");
  if (typeof said === "string") return said;
  return [typeof said === "object" && said ? answered(said) : said, more].filter(Boolean).join(" · ");
}
