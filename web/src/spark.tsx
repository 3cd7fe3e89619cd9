// A line the size of a word, as SVG: 50 of them cost nothing.

export function Spark({ values, label, width = 220, height = 48 }: { values: (number | null)[]; label: string; width?: number; height?: number }) {
  const known = values.map((v, i) => [i, v] as const).filter((p): p is readonly [number, number] => p[1] !== null && Number.isFinite(p[1]));
  if (known.length < 2) return <div class="spark none" style={{ height: `${height}px` }} />;
  const ys = known.map((p) => p[1]);
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const x = (i: number) => ((i / (values.length - 1)) * width).toFixed(1);
  const y = (v: number) => (height - 4 - ((v - low) / (high - low || 1)) * (height - 8)).toFixed(1);
  const path = known.map(([i, v], k) => `${k ? "L" : "M"}${x(i)} ${y(v)}`).join("");
  const end = known[known.length - 1];
  return (
    <svg class="spark" viewBox={`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label={label}>
      <path class="spark-area" d={`${path}L${x(end[0])} ${height}L${x(known[0][0])} ${height}Z`} />
      <path class="spark-line" d={path} vector-effect="non-scaling-stroke" />
    </svg>
  );
}
