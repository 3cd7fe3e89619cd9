// A manifest that ties built assets to their source: the SHA-256 of all source files together and of every built file,
// so that the package's tests can tell, without Node, that neither was changed without the other.

import { createHash } from "node:crypto";
import { cpSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";

export const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), "..");

/** Where the built page lies: `--to DIR` finishes a build made elsewhere. */
export function target(usual) {
  const at = process.argv.indexOf("--to");
  return at > 0 ? resolve(process.argv[at + 1]) : resolve(ROOT, usual);
}

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

/** Put the licences of the packages that were bundled beside the page. */
export function licences(dist, packages) {
  for (const name of packages) cpSync(join(ROOT, "node_modules", name, "LICENSE"), join(dist, `LICENSE.${name}`));
}

export function writeManifest(dist, sources) {
  const built = named(dist, files(dist)).filter(([name]) => name !== "manifest.json");
  const manifest = {
    sources: together(named(ROOT, sources.flatMap((p) => files(join(ROOT, p))))),
    files: Object.fromEntries(built.map(([name, path]) => [name, sha(readFileSync(path))])),
  };
  writeFileSync(join(dist, "manifest.json"), JSON.stringify(manifest, null, 2) + "\n");
  const size = built.filter(([n]) => n.startsWith("page")).map(([n, p]) => `${n} ${(readFileSync(p).length / 1024).toFixed(0)} KiB`);
  console.log(`manifest.json: ${built.length} files; ${size.join(", ")}`);
}
