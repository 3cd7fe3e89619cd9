// An empty conversation: which model answers, or what keeps it from answering, and something to begin with.

import { useEffect } from "preact/hooks";
import { useCell } from "../../src/cell";
import { grouped } from "../../src/format";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { loadModels, models } from "./acts";
import { keyWanted } from "./answer";
import { settings } from "./settings";

const CHAT = ["Explain in three sentences how a mixture of experts chooses its experts.", "Write a Python function that merges two sorted lists, and test it.", "Make a table of four sorting algorithms with their cost.", "What is the difference between global and sliding-window attention?"];
const TEXT = ["Once upon a time", "The three laws of thermodynamics are", "def fibonacci(n):\n", "Dear colleagues,\n\n"];
const LOOK = 2000; // ms between two looks at a server that is not there yet

export function Welcome({ onPick }: { onPick: (text: string) => void }) {
  const { list, failure } = useCell(models);
  const { model, mode } = useCell(settings);
  const waits = failure !== null && ["starting", "unreached", "server", "busy"].includes(failure.trouble);
  useEffect(() => {
    if (!waits) return;
    const timer = setTimeout(loadModels, LOOK);
    return () => clearTimeout(timer);
  }, [failure]);
  const room = list?.find((m) => m.id === model)?.max_model_len;
  return (
    <section class="welcome">
      <svg class="mark" width="44" height="44" viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="8" /><path d="M5 19h5l3-10 5 16 3-9h6" /></svg>
      {failure ? <Absent failure={failure} waits={waits} /> : list && !list.length ? <h1>{t("The server has no model")}</h1> : list ? (
        <>
          <h1>{model}</h1>
          <p class="note">{t(mode === "text" ? "Continues the text you begin." : "Answers come from this server; nothing is sent elsewhere.")}{room ? ` ${t("Room for {n} tokens.", { n: grouped(room) })}` : ""}</p>
          <ul class="starters" aria-label={t("To begin with")}>
            {(mode === "text" ? TEXT : CHAT).map((text) => <li key={text}><button type="button" class="card" onClick={() => onPick(mode === "text" ? text : t(text))}>{mode === "text" ? text.trim() : t(text)}</button></li>)}
          </ul>
        </>
      ) : <span class="loading" />}
    </section>
  );
}

function Absent({ failure, waits }: { failure: import("./api").Failure; waits: boolean }) {
  const head = { starting: "The server is not ready.", unreached: "The server cannot be reached.", key: "The server wants an API key.", busy: "The server is busy." }[failure.trouble as string] ?? "The server failed.";
  return (
    <div role="status" class="absent">
      <h1>{t(head)}</h1>
      <p class="note">{failure.message}</p>
      {waits && <p class="status"><span class="loading small" /> {t("The page looks again by itself.")}</p>}
      {failure.trouble === "key" && <button type="button" class="button primary" onClick={() => (keyWanted.value = { why: failure.message, again: () => void loadModels() })}><Icon name="key" size={14} />{t("Enter a key")}</button>}
      {!waits && failure.trouble !== "key" && <button type="button" class="button" onClick={() => void loadModels()}>{t("Try again")}</button>}
    </div>
  );
}
