// The models that the server has, the one that is asked, and how: in a conversation, or as the continuation of a text.

import { Cell, useCell } from "../../src/cell";
import { models as askModels, Failure, keyWanted, type Model } from "./api";
import { type Settings, set, settings } from "./settings";

export interface ModelState {
  list: Model[] | null;
  failure: Failure | null;
}
export const models = new Cell<ModelState>({ list: null, failure: null });

/** Ask for the list of models; with it the page learns whether the server is there, ready, and wants a key. */
export async function loadModels(): Promise<void> {
  try {
    const list = await askModels();
    models.value = { list, failure: null };
    if (list.length && !list.some((m) => m.id === settings.value.model)) set({ model: (list.find((m) => !m.parent) ?? list[0]).id });
  } catch (error) {
    const failure = error instanceof Failure ? error : new Failure("server", String(error));
    models.value = { list: models.value.list, failure };
    if (failure.trouble === "key") keyWanted.value = { why: failure.message, again: () => void loadModels() };
  }
}

export const modelNow = (): Model | undefined => models.value.list?.find((m) => m.id === settings.value.model);

/** A model that the server knows to have no chat template can only continue texts, whatever was chosen. */
export const modeNow = (): Settings["mode"] => (modelNow()?.chat === false ? "text" : settings.value.mode);

export function useModel(): { model: Model | undefined; mode: Settings["mode"] } {
  useCell(models);
  useCell(settings);
  return { model: modelNow(), mode: modeNow() };
}
