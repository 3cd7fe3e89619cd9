// Line icons, 16 × 16, drawn here.

const PATHS: Record<string, string> = {
  check: "M3 8.5l3.2 3.2L13 4.8",
  warn: "M8 2.2L14.6 13.6H1.4zM8 6.4v3.2M8 11.6v.2",
  alarm: "M5.2 1.8h5.6l3.4 3.4v5.6l-3.4 3.4H5.2l-3.4-3.4V5.2zM8 4.8v4M8 11v.2",
  none: "M4 8h8",
  sun: "M8 5.2a2.8 2.8 0 100 5.6 2.8 2.8 0 000-5.6M8 1v1.6M8 13.4V15M1 8h1.6M13.4 8H15M3 3l1.1 1.1M11.9 11.9L13 13M3 13l1.1-1.1M11.9 4.1L13 3",
  moon: "M13.4 9.6A5.8 5.8 0 016.4 2.6 5.8 5.8 0 1013.4 9.6z",
  search: "M7 2.5a4.5 4.5 0 100 9 4.5 4.5 0 000-9M10.3 10.3L14 14",
  help: "M8 1.6a6.4 6.4 0 100 12.8A6.4 6.4 0 008 1.6M6 6.2A2 2 0 018 4.6c1.2 0 2 .7 2 1.7 0 1.5-2 1.5-2 3M8 11.4v.2",
  close: "M4 4l8 8M12 4l-8 8",
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  left: "M10 3L5 8l5 5",
  right: "M6 3l5 5-5 5",
  reset: "M3 8a5 5 0 105-5H4.5M6.6 1L4.4 3l2.2 2",
  log: "M2.5 2.5v11h11M5 11c1-5 3-6.5 8-7",
  eye: "M1.5 8S4 3.6 8 3.6 14.5 8 14.5 8 12 12.4 8 12.4 1.5 8 1.5 8zM8 6.2a1.8 1.8 0 100 3.6 1.8 1.8 0 000-3.6",
  fit: "M2.5 6V2.5H6M10 2.5h3.5V6M13.5 10v3.5H10M6 13.5H2.5V10M5 8h6",
  trash: "M2.5 4h11M6 4V2.5h4V4M4 4l.7 9.5h6.6L12 4",
  play: "M4.5 2.8l8 5.2-8 5.2z",
  pause: "M5.2 3v10M10.8 3v10",
  stop: "M4 4h8v8H4z",
  save: "M3 2.5h8l2.5 2.5v8.5h-10.5zM5.5 2.5v3.5h4.5v-3.5M5.5 13.5V9h5v4.5",
  rewind: "M7.5 3.5L3 8l4.5 4.5zM13 3.5L8.5 8l4.5 4.5z",
  shield: "M8 1.6l5.4 2v4.2c0 3.2-2.2 5.4-5.4 6.6-3.2-1.2-5.4-3.4-5.4-6.6V3.6z",
  replay: "M13 8a5 5 0 11-1.6-3.7M11.6 1.4v3h-3M6.8 5.8l3.6 2.2-3.6 2.2z",
  camera: "M2 5h2.6l1-1.6h4.8l1 1.6H14v8H2zM8 6.8a2.3 2.3 0 100 4.6 2.3 2.3 0 000-4.6",
  live: "M8 6.6a1.4 1.4 0 100 2.8 1.4 1.4 0 000-2.8M4.6 11.4a4.8 4.8 0 010-6.8M11.4 4.6a4.8 4.8 0 010 6.8M2.6 13.4a7.6 7.6 0 010-10.8M13.4 2.6a7.6 7.6 0 010 10.8",
  flag: "M3.5 14.5v-12h8l-1.8 3 1.8 3h-8",
  out: "M9 2.5h4.5V7M13.5 2.5L7 9M6.5 3.5H3v9.5h9.5V9.5",
};

/** More of them, for a page of its own. */
export const draw = (paths: Record<string, string>) => void Object.assign(PATHS, paths);

export function Icon({ name, size = 16 }: { name: string; size?: number }) {
  return (
    <svg class="icon" width={size} height={size} viewBox="0 0 16 16" aria-hidden="true" focusable="false">
      <path d={PATHS[name] ?? PATHS.none} fill="none" stroke="currentColor" stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round" />
    </svg>
  );
}

export const severityIcon = (severity: string) => ({ critical: "alarm", warning: "warn", info: "flag", ok: "check" })[severity] ?? "none";
