// Server-sent events off a byte stream (WHATWG HTML, 9.2.6), as far as an API needs them: only ``data`` counts.

/** The ``data`` of each event; pieces may be cut anywhere, lines may end in any of the three ways. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let [kept, data] = ["", [] as string[]];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      kept += decoder.decode(value, { stream: !done });
      const cut = kept.endsWith("\r") && !done ? kept.slice(0, -1) : kept; // its \n may be in the next piece
      const lines = cut.split(/\r\n|\r|\n/);
      kept = (lines.pop() ?? "") + kept.slice(cut.length);
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
      if (done) {
        if (data.length) yield data.join("\n"); // a server that forgets the last empty line
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
