// How an expert looks wherever it appears: one of eight colours after Okabe and Ito (2008), which stay apart for every kind of
// colour vision, and one of four patterns. Its number stands beside it always.

import { dark } from "../../src/palette";

const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#6b5bd2", "#5c6470"];
const DARK = ["#4a90d9", "#ff8a3d", "#2fc79a", "#e794c2", "#e6c229", "#9fdcff", "#a99bff", "#aab3c0"];

export const expertStyle = (expert: number) => ({ "--c": (dark.value ? DARK : LIGHT)[expert % 8] });
export const expertClass = (expert: number) => `pattern-${Math.floor(expert / 8) % 4}`;
