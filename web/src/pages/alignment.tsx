// Alignment runs: reward, margin, divergence from the reference, lengths; shown once such series are logged.

import { Panel } from "../panel";
import { byName } from "../picker";
import { useRun } from "../run";
import { t } from "../text";
import { Timeline } from "../timeline";

export const ALIGNMENT = /^(align|alignment|reward|rewards|dpo|grpo|ppo|rl|kl|sft)\//;

export function Alignment() {
  const run = useRun();
  const list = [...run.series.values()].filter((s) => ALIGNMENT.test(s.name)).sort(byName);
  if (!list.length) return <p class="empty">{t("This run logs nothing about alignment.")}</p>;
  return (
    <section class="alignment">
      <Timeline series={list[0].name} />
      <div class="panels two">{list.slice(0, 40).map((s) => <Panel key={s.name} names={[s.name]} smooth={0.006} />)}</div>
    </section>
  );
}
