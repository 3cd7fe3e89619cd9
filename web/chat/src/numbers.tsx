// How fast an answer came, and of how many tokens.

import { duration, grouped, short } from "../../src/format";
import { t } from "../../src/text";
import type { Numbers } from "./answer";

export function Figures({ numbers, live, model }: { numbers?: Numbers; live: boolean; model?: string }) {
  if (!numbers?.answer && !numbers?.prompt) return null;
  const { prompt, cached, answer, first, speed } = numbers;
  return (
    <dl class={live ? "figures live" : "figures"}>
      {speed !== undefined && <div class="speed"><dt class="sr">{t("Speed")}</dt><dd title={t("Tokens a second after the first token")}><b>{short(speed)}</b> {t("tokens/s")}</dd></div>}
      {first !== undefined && <div><dt class="sr">{t("Time to the first token")}</dt><dd title={t("From pressing send to the first token, the network included")}>{t("first after {x}", { x: duration(first) })}</dd></div>}
      {answer !== undefined && <div><dt class="sr">{t("Answer")}</dt><dd title={t("Tokens of the answer")}>{t("{n} tokens", { n: grouped(answer) })}</dd></div>}
      {prompt !== undefined && <div><dt class="sr">{t("Prompt")}</dt><dd title={t("Tokens of the prompt; cached ones were not computed again")}>{t("prompt {n}", { n: grouped(prompt) })}{cached ? ` (${t("{n} cached", { n: grouped(cached) })})` : ""}</dd></div>}
      {model && !live && <div class="of"><dt class="sr">{t("Model")}</dt><dd>{model}</dd></div>}
    </dl>
  );
}
