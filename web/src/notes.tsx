// What people write about a run, or about one of its steps: the next shift reads it.

import { useState } from "preact/hooks";
import { runPath, send } from "./api";
import { atStep, ago } from "./format";
import { useGet, useRun } from "./run";
import { t } from "./text";

interface Note {
  id: number;
  time: number;
  step: number | null;
  by: string;
  text: string;
}

export function Notes({ step }: { step?: number }) {
  const run = useRun();
  const [again, setAgain] = useState(0);
  const [text, setText] = useState("");
  const [failed, setFailed] = useState<string | null>(null);
  const { value } = useGet<Note[]>(runPath(run.id, "/notes"), again);
  const shown = (value ?? []).filter((n) => step === undefined || n.step === step);
  const add = async (e: Event) => {
    e.preventDefault();
    try {
      await send("POST", runPath(run.id, "/notes"), { text: text.trim(), step: step ?? run.live.step.value ?? run.info?.step ?? undefined });
      setText("");
      setFailed(null);
      setAgain((n) => n + 1);
    } catch (error) {
      setFailed((error as Error).message);
    }
  };
  return (
    <section class="card notes" aria-label={t("Notes")}>
      <h3>{t("Notes")}</h3>
      {shown.length > 0 && (
        <ul>
          {shown.map((n) => (
            <li key={n.id}>
              <p>{n.text}</p>
              <small>{[n.step === null ? "" : `${atStep(n.step)}`, n.by, ago(n.time)].filter(Boolean).join(" · ")}</small>
            </li>
          ))}
        </ul>
      )}
      <form onSubmit={add}>
        <input type="text" value={text} maxLength={2000} placeholder={t("What the next reader should know")} aria-label={t("New note")} onInput={(e) => setText((e.target as HTMLInputElement).value)} />
        <button type="submit" class="button" disabled={!text.trim()}>{t("Add")}</button>
      </form>
      {failed && <p class="failed" role="alert">{failed}</p>}
    </section>
  );
}
