// An empty conversation: which model answers, or what keeps it from answering, and something to begin with.

import { useEffect } from "preact/hooks";
import { useCell } from "../../src/cell";
import { grouped, short } from "../../src/format";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { keyWanted, type Model } from "./api";
import { loadModels, models, useModel } from "./model";

const CHAT = ["Explain in three sentences how a mixture of experts chooses its experts.", "Write a Python function that merges two sorted lists, and test it.", "Make a table of four sorting algorithms with their cost.", "What is the difference between global and sliding-window attention?"];
const TEXT = ["Once upon a time", "The three laws of thermodynamics are", "def fibonacci(n):\n", "Dear colleagues,\n\n"];
const LOOK = 2000; // ms between two looks at a server that is not there yet

export function Welcome({ onPick }: { onPick: (text: string) => void }) {
  const { list, failure } = useCell(models);
  const { model, mode } = useModel();
  const waits = failure !== null && ["starting", "unreached", "server", "busy"].includes(failure.trouble);
  useEffect(() => {
    if (!waits) return;
    const timer = setTimeout(loadModels, LOOK);
    return () => clearTimeout(timer);
  }, [failure]);
  return (
    <section class="welcome">
      <svg class="mark" width="44" height="44" viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="8" /><path d="M5 19h5l3-10 5 16 3-9h6" /></svg>
      {failure ? <Absent failure={failure} waits={waits} /> : list && !list.length ? <h1>{t("The server has no model")}</h1> : list ? (
        <>
          <h1>{model?.id}</h1>
          <p class="note">{t(mode === "text" ? "Continues the text you begin." : "Answers come from this server; nothing is sent elsewhere.")}</p>
          {model && <Facts model={model} />}
          <ul class="starters" aria-label={t("To begin with")}>
            {(mode === "text" ? TEXT : CHAT).map((text) => <li key={text}><button type="button" class="card" onClick={() => onPick(mode === "text" ? text : t(text))}>{mode === "text" ? text.trim() : t(text)}</button></li>)}
          </ul>
        </>
      ) : <span class="loading" />}
    </section>
  );
}

function Facts({ model: { parameters, max_model_len, experts, expert_layers, hybrid_layers } }: { model: Model }) {
  const facts = [
    parameters && t("{n} parameters", { n: short(parameters) }),
    max_model_len && t("room for {n} tokens", { n: grouped(max_model_len) }),
    experts && expert_layers?.length && t("{n} experts in {k} layers", { n: experts, k: expert_layers.length }),
    hybrid_layers?.length && t("{k} hybrid layers", { k: hybrid_layers.length }),
  ];
  return <p class="note">{facts.filter(Boolean).join(" · ")}</p>;
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
