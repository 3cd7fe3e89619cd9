import { defineConfig } from "vite";

// As the monitor's page (../vite.config.ts): the built page lives inside the Python package, under names without a hash.
const server = process.env.DEEPSEEK_SERVE ?? "http://127.0.0.1:8000";

export default defineConfig({
  root: import.meta.dirname,
  base: "./",
  build: {
    outDir: "../../deepseek/serve/web/dist",
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
  server: { proxy: { "/v1": server, "/ready": server } },
});
