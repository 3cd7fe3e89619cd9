// After Vite: the trace viewer's released files beside the monitor's page, and the manifest (manifest.mjs).

import { cpSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { licences, ROOT, target, writeManifest } from "./manifest.mjs";

const DIST = target("../deepseek/monitor/web/dist");
const SOURCES = ["src", "public", "build", "index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts"];
const VIEWER_LEFT_OUT = /^(perf-vertx.*|.*\.map|file-format-schema\.json)$/;

const viewer = join(ROOT, "node_modules/speedscope");
const folder = join(DIST, "speedscope");
rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });
for (const name of readdirSync(join(viewer, "dist/release")))
  if (!VIEWER_LEFT_OUT.test(name)) cpSync(join(viewer, "dist/release", name), join(folder, name));
cpSync(join(viewer, "LICENSE"), join(folder, "LICENSE"));
licences(DIST, ["preact", "uplot"]);
writeManifest(DIST, SOURCES);
