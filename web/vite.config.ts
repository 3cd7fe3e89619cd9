import { defineConfig } from "vite";

// The built page lives inside the Python package, so that a machine without Node has it. Names carry no hash:
// the server sends an ETag, and a commit shows a change of content and not a change of names.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../deepseek/monitor/web/dist",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rollupOptions: {
      output: {
        entryFileNames: "page.js",
        chunkFileNames: "page-[name].js",
        assetFileNames: "page[extname]",
      },
    },
  },
  server: { proxy: { "/api": process.env.DEEPSEEK_MONITOR ?? "http://127.0.0.1:6060" } },
});
