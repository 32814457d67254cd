// Forest plots, drawn by hand as SVG: ours with its interval and seeds, and the report's number.

const ROW = 24,
  TOP = 22,
  BOTTOM = 34,
  LEFT = 172,
  RIGHT = 16;

// Round numbers that a range of values is marked with.
export function ticks(low, high, wanted = 6) {
  const rough = (high - low) / wanted,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((n) => n * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) {
    found.push(Math.round(at * 1e6) / 1e6);
  }
  return found;
}

const escaped = (text) =>
  text.replace(/[&<"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", '"': "&quot;" })[c]);

// An SVG of so many pixels. rows: [{label, mean, half, values, report, row}], in points; axis
// says what of.
export function forest(rows, axis, title, width) {
  const numbers = rows
    .flatMap(({ mean, half, values, report }) => [
      mean - (half ?? 0),
      mean + (half ?? 0),
      ...values,
      report,
    ])
    .filter(Number.isFinite);
  let [low, high] = [Math.min(0, ...numbers), Math.max(0, ...numbers)];
  const margin = (high - low || 1) * 0.04;
  [low, high] = [low - margin, high + margin];
  const bottom = TOP + ROW * rows.length;
  const height = bottom + BOTTOM;
  const x = (value) => LEFT + ((width - LEFT - RIGHT) * (value - low)) / (high - low);
  const parts = [
    `<svg viewBox="0 0 ${width} ${height}" width="${width}" role="img"
    aria-label="${escaped(title)}"><text x="0" y="14">${escaped(title)}</text>`,
  ];
  for (const at of ticks(low, high, width > 480 ? 8 : 4)) {
    const number = (at > 0 ? "+" : "") + String(at).replace("-", "−");
    parts.push(`<line class="rule" x1="${x(at)}" x2="${x(at)}" y1="${TOP}" y2="${bottom}"/>
      <text x="${x(at)}" y="${bottom + 14}" text-anchor="middle">${number}</text>`);
  }
  parts.push(`<line class="zero" x1="${x(0)}" x2="${x(0)}" y1="${TOP}" y2="${bottom}"/>
    <text x="${width / 2}" y="${height - 4}" text-anchor="middle">${escaped(axis)}
    </text>`);
  rows.forEach(({ row, label, mean, half, values, report }, i) => {
    const y = TOP + ROW * (i + 0.5);
    parts.push(`<g data-row="${escaped(row)}"><text x="0" y="${y + 4}">${escaped(label)}</text>`);
    if (half !== null) {
      parts.push(
        `<line class="half" x1="${x(mean - half)}" x2="${x(mean + half)}" y1="${y}" y2="${y}"/>`,
      );
    }
    for (const value of values)
      parts.push(`<circle class="seed" cx="${x(value)}" cy="${y}" r="3.5"/>`);
    if (mean !== null)
      parts.push(`<rect class="mean" x="${x(mean) - 4}" y="${y - 4}" width="8" height="8"/>`);
    if (report !== null) {
      const at = x(report);
      parts.push(`<path class="report" d="M${at} ${y - 6}l6 6l-6 6l-6 -6z"/>`);
    }
    parts.push("</g>");
  });
  return `${parts.join("")}</svg>`;
}
