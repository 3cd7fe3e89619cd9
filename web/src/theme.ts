// Dark or light: the system's wish, until the reader says otherwise.

import { Cell, remember, remembered } from "./cell";
import { dark } from "./palette";

export type Theme = "system" | "dark" | "light";
export const theme = new Cell<Theme>(remembered("theme", "system") as Theme);
const system = matchMedia("(prefers-color-scheme: dark)");

export function applyTheme(): void {
  const isDark = theme.value === "dark" || (theme.value === "system" && system.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  dark.value = isDark;
}

export function switchTheme(): void {
  theme.value = dark.value ? "light" : "dark";
  remember("theme", theme.value);
  applyTheme();
}

system.addEventListener("change", applyTheme);
applyTheme();

export const calm = matchMedia("(prefers-reduced-motion: reduce)");
