// After Vite: the trace viewer's released files beside the page, and a manifest that ties the assets to their source.
//
// manifest.json holds the SHA-256 of all source files together and of every built file, so that the package's tests
// can tell, without Node, that neither was changed without the other. `--to DIR` finishes a build made elsewhere.

import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), "..");
const at = process.argv.indexOf("--to");
const DIST = at > 0 ? resolve(process.argv[at + 1]) : resolve(ROOT, "../deepseek/monitor/web/dist");
const SOURCES = ["src", "public", "build", "index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts"];
const VIEWER_LEFT_OUT = /^(perf-vertx.*|.*\.map|file-format-schema\.json)$/;

function files(path) {
  try {
    return readdirSync(path, { withFileTypes: true }).flatMap((e) => files(join(path, e.name)));
  } catch (error) {
    if (error.code === "ENOTDIR") return [path];
    throw error;
  }
}

const named = (root, paths) => paths.map((p) => [relative(root, p).split("\\").join("/"), p]).sort(([a], [b]) => (a < b ? -1 : 1));
const sha = (bytes) => createHash("sha256").update(bytes).digest("hex");

function together(pairs) {
  const hash = createHash("sha256");
  for (const [name, path] of pairs) hash.update(`${name}\0${sha(readFileSync(path))}\n`);
  return hash.digest("hex");
}

const viewer = join(ROOT, "node_modules/speedscope");
const target = join(DIST, "speedscope");
rmSync(target, { recursive: true, force: true });
mkdirSync(target, { recursive: true });
for (const name of readdirSync(join(viewer, "dist/release")))
  if (!VIEWER_LEFT_OUT.test(name)) cpSync(join(viewer, "dist/release", name), join(target, name));
cpSync(join(viewer, "LICENSE"), join(target, "LICENSE"));
for (const name of ["preact", "uplot"])
  cpSync(join(ROOT, "node_modules", name, "LICENSE"), join(DIST, `LICENSE.${name}`));

const built = named(DIST, files(DIST)).filter(([name]) => name !== "manifest.json");
const manifest = {
  sources: together(named(ROOT, SOURCES.flatMap((p) => files(join(ROOT, p))))),
  files: Object.fromEntries(built.map(([name, path]) => [name, sha(readFileSync(path))])),
};
writeFileSync(join(DIST, "manifest.json"), JSON.stringify(manifest, null, 2) + "\n");
const size = built.filter(([n]) => n.startsWith("page")).map(([n, p]) => `${n} ${(readFileSync(p).length / 1024).toFixed(0)} KiB`);
console.log(`manifest.json: ${built.length} files; ${size.join(", ")}`);
