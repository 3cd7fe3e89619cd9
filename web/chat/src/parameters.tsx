// The panel of what is sent with every question. An empty field means: the server decides.

import { useEffect, useState } from "preact/hooks";
import { useCell } from "../../src/cell";
import { Icon } from "../../src/icons";
import { t } from "../../src/text";
import { useModel } from "./model";
import { apply, BUILT_IN, type Dial, DIALS, forgetPreset, matching, presets, reset, savePreset, schemaOf, set, settings } from "./settings";

export function Parameters() {
  const s = useCell(settings);
  const { model, mode } = useModel();
  const drawing = DIALS.slice(0, 4);
  const length = DIALS.slice(4, 6);
  const penalties = DIALS.slice(6);
  return (
    <div class="params-in">
      <Presets />
      <section aria-label={t("Drawing tokens")}>{drawing.map((d) => <Row key={d.name} dial={d} />)}</section>
      <section aria-label={t("Length and end")}>
        {length.map((d) => <Row key={d.name} dial={d} />)}
        <Stops />
      </section>
      <details class="fold" open={penalties.some((d) => s[d.name] !== undefined)}>
        <summary>{t("Penalties")}</summary>
        {penalties.map((d) => <Row key={d.name} dial={d} />)}
      </details>
      {mode === "chat" && <section aria-label={t("Form of the answer")}>
        <h3>{t("Form of the answer")}</h3>
        <Choice value={s.format} name={t("Form of the answer")} options={[["text", "Free"], ["json_object", "JSON"], ["json_schema", "JSON schema"]]} onPick={(format) => set({ format })} />
        {s.format === "json_schema" && <Schema />}
      </section>}
      <section aria-label={t("Token details")}>
        <h3>{t("Token details")}</h3>
        <label class="tick"><input type="checkbox" checked={s.trace} onChange={(e) => set({ trace: e.currentTarget.checked })} /><span>{t("Experts and branches")}<small>{t(model?.experts === 0 && !model.hybrid_layers?.length ? "this model has neither" : "which ones worked on each token")}</small></span></label>
        <label class="tick"><input type="checkbox" checked={s.logprobs} onChange={(e) => set({ logprobs: e.currentTarget.checked })} /><span>{t("Probabilities")}<small>{t("of each token and its alternatives")}</small></span></label>
        {s.logprobs && <label class="row"><span>{t("Alternatives")}</span><input type="number" min={0} max={20} value={s.alternatives} onInput={(e) => { const n = e.currentTarget.valueAsNumber; if (n >= 0 && n <= 20) set({ alternatives: Math.round(n) }); }} /></label>}
      </section>
      <section aria-label={t("Use of the model")}>
        <h3>{t("Use of the model")}</h3>
        {model?.chat !== false && <Choice value={s.mode} name={t("Use of the model")} options={[["chat", "Chat"], ["text", "Continue a text"]]} onPick={(next) => set({ mode: next })} />}
        {mode === "text" && <p class="note">{t("For models without a chat template: the words go to the model as they are.")}</p>}
      </section>
      <button type="button" class="button reset" onClick={reset}><Icon name="reset" size={14} />{t("Reset to the server's defaults")}</button>
    </div>
  );
}

function Presets() {
  const s = useCell(settings);
  const own = useCell(presets);
  const [naming, setNaming] = useState(false);
  const at = matching(s, own);
  const all = { ...BUILT_IN, ...own };
  const keep = (e: SubmitEvent & { currentTarget: HTMLFormElement }) => {
    e.preventDefault();
    const name = String(new FormData(e.currentTarget).get("name")).trim();
    if (name) savePreset(name.slice(0, 40));
    setNaming(false);
  };
  return (
    <section class="presets" aria-label={t("Presets")}>
      <div class="presets-row">
        <select aria-label={t("Preset")} value={at} onChange={(e) => apply(all[e.currentTarget.value] ?? {})}>
          {!at && <option value="">{t("Changed")}</option>}
          {Object.keys(BUILT_IN).map((name) => <option key={name} value={name}>{t(name)}</option>)}
          {Object.keys(own).map((name) => <option key={name} value={name}>{name}</option>)}
        </select>
        <button type="button" class="icon-button" onClick={() => setNaming(!naming)} aria-expanded={naming} aria-label={t("Keep as a preset")} title={t("Keep as a preset")}><Icon name="save" /></button>
        <button type="button" class="icon-button" disabled={!Object.hasOwn(own, at)} onClick={() => forgetPreset(at)} aria-label={t("Delete the preset")} title={t("Delete the preset")}><Icon name="trash" /></button>
      </div>
      {naming && (
        <form class="presets-row" onSubmit={keep} onKeyDown={(e) => { if (e.key === "Escape") setNaming(false); }}>
          <input name="name" type="text" maxLength={40} required placeholder={t("Name of the preset")} aria-label={t("Name of the preset")} ref={(e) => e?.focus()} />
          <button type="submit" class="button">{t("Keep")}</button>
        </form>
      )}
    </section>
  );
}

function Row({ dial }: { dial: Dial }) {
  const { name, low, high, step, usual, slider } = dial;
  const value = useCell(settings)[name];
  const [text, setText] = useState(value === undefined ? "" : String(value));
  const number = Number(text);
  const wrong = text !== "" && !(number >= low && number <= high && (step < 1 || Number.isInteger(number)));
  useEffect(() => {
    if (value === undefined ? !wrong : Number(text) !== value) setText(value === undefined ? "" : String(value));
  }, [value]);
  const type = (next: string) => {
    setText(next);
    const n = Number(next);
    const good = next !== "" && n >= low && n <= high && (step < 1 || Number.isInteger(n));
    set({ [name]: good ? n : undefined });
  };
  const id = `dial-${name}`;
  return (
    <div class={value === undefined ? "dial unset" : "dial"}>
      <label for={id}>{t(dial.label)}</label>
      <input id={id} type="number" inputMode="decimal" min={low} max={high} step={step} value={text} placeholder={t("default")} aria-invalid={wrong} aria-describedby={`${id}-about`} onInput={(e) => type(e.currentTarget.value)} />
      <button type="button" class="icon-button unset-button" disabled={value === undefined && !text} onClick={() => { setText(""); set({ [name]: undefined }); }} aria-label={t("{name}: the server's default", { name: t(dial.label) })} title={t("The server's default")}><Icon name="close" size={12} /></button>
      {slider && <input type="range" min={low} max={high} step={step} value={value ?? usual} aria-label={t("{name}, slider", { name: t(dial.label) })} onInput={(e) => type(String(e.currentTarget.valueAsNumber))} />}
      <small id={`${id}-about`}>{wrong ? t("A number from {low} to {high}", { low, high }) : t(dial.about)}</small>
    </div>
  );
}

const shownStops = (stops: string[]) => stops.map((x) => x.replaceAll("\\", "\\\\").replaceAll("\n", "\\n")).join("\n");
const readStops = (text: string) => text.split("\n").filter(Boolean).map((x) => x.replace(/\\(n|\\)/g, (_, c) => (c === "n" ? "\n" : "\\")));

function Stops() {
  const { stop } = useCell(settings);
  const [text, setText] = useState(shownStops(stop));
  useEffect(() => {
    if (JSON.stringify(readStops(text)) !== JSON.stringify(stop)) setText(shownStops(stop));
  }, [stop]);
  return (
    <label class="area">
      <span>{t("Stop texts")}<small>{t("one a line; \\n is a line break")}</small></span>
      <textarea rows={2} spellcheck={false} value={text} onInput={(e) => { setText(e.currentTarget.value); set({ stop: readStops(e.currentTarget.value) }); }} />
    </label>
  );
}

function Schema() {
  const { schema } = useCell(settings);
  const { wrong } = schemaOf(schema);
  const empty = !schema.trim();
  return (
    <div class="area">
      <label for="schema">{t("Schema")}</label>
      <textarea id="schema" rows={8} spellcheck={false} class="mono" value={schema} placeholder={'{"type": "object",\n "properties": {"name": {"type": "string"}},\n "required": ["name"]}'} aria-invalid={wrong !== undefined && !empty} onInput={(e) => set({ schema: e.currentTarget.value })} />
      <small class={wrong !== undefined && !empty ? "bad" : undefined} role="status">{empty ? t("Without a schema the answer is free.") : wrong !== undefined ? t("No JSON schema: {why}", { why: wrong }) : t("The answer will match it.")}</small>
    </div>
  );
}

function Choice<T extends string>({ value, options, onPick, name }: { value: T; options: [T, string][]; onPick: (value: T) => void; name: string }) {
  return (
    <div class="segments" role="group" aria-label={name}>
      {options.map(([key, label]) => <button key={key} type="button" aria-pressed={key === value} onClick={() => onPick(key)}>{t(label)}</button>)}
    </div>
  );
}
