// The address after '#': a page and its query. Everything a colleague needs to see the same thing is in it.

import { Cell, useCell } from "./cell";

export interface Route {
  path: string[]; // decoded: ["run", "big/one", "incidents", "3"]
  query: URLSearchParams;
}

function parse(): Route {
  const hash = location.hash.replace(/^#\/?/, "");
  const cut = hash.indexOf("?");
  const path = (cut < 0 ? hash : hash.slice(0, cut)).split("/").filter(Boolean).map(decodeURIComponent);
  return { path, query: new URLSearchParams(cut < 0 ? "" : hash.slice(cut + 1)) };
}

export const route = new Cell<Route>(parse());
addEventListener("hashchange", () => (route.value = parse()));

export const useRoute = () => useCell(route);

export function link(path: (string | number)[], query: Record<string, string | undefined> = {}): string {
  const parts = new URLSearchParams();
  for (const [key, value] of Object.entries(query)) if (value !== undefined && value !== "") parts.set(key, value);
  const text = parts.toString();
  return `#/${path.map((p) => encodeURIComponent(String(p))).join("/")}${text ? `?${text}` : ""}`;
}

export function go(address: string, replace = false): void {
  if (location.hash === address) return;
  if (replace) {
    history.replaceState(null, "", address);
    route.value = parse();
  } else location.hash = address;
}

/** Change parts of the query and stay on the page; ``undefined`` takes a key out. */
export function setQuery(change: Record<string, string | undefined>): void {
  const { path, query } = route.value;
  const all: Record<string, string | undefined> = Object.fromEntries(query);
  go(link(path, { ...all, ...change }), true);
}
