// After Vite: the licence and the manifest of the chat page. SHARED names what it takes from the monitor's source.

import { licences, target, writeManifest } from "../build/manifest.mjs";

const SHARED = ["base.css", "cell.ts", "dialog.tsx", "format.ts", "heat.tsx", "icons.tsx", "keys.ts", "palette.ts", "text.ts", "theme.ts"];
const SOURCES = ["chat", ...SHARED.map((name) => `src/${name}`), "build/manifest.mjs", "package.json", "package-lock.json", "tsconfig.json"];

const DIST = target("../deepseek/serve/web/dist");
licences(DIST, ["preact"]);
writeManifest(DIST, SOURCES);
