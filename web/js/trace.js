// The way of a garment: how sure each network was of the true class, drawn by hand as SVG.

const LEFT = 44,
  RIGHT = 10,
  TOP = 8,
  BOTTOM = 30;
const DASHES = ["", "7 4", "2 3"];

export function drawTrace(box, trace, downs) {
  const width = Math.max(box.clientWidth, 240),
    height = width > 480 ? 230 : 160;
  const inner = width - LEFT - RIGHT;
  const steps = Math.max(28, trace.length - 1);
  const x = (i) => LEFT + (inner * i) / steps;
  const y = (p) => TOP + (height - TOP - BOTTOM) * (1 - p);
  const parts = [
    `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img"
    aria-label="Probability of the true class along the way">`,
  ];
  for (const p of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(`<line class="rule" x1="${LEFT}" x2="${width - RIGHT}" y1="${y(p)}" y2="${y(p)}"/>
      <text x="${LEFT - 6}" y="${y(p) + 4}" text-anchor="end">${100 * p} %</text>`);
  }
  const every = [4, 8, 20, 40].find((n) => (inner * n) / steps > 34) ?? 80;
  for (let i = 0; i <= steps; i += every) {
    parts.push(`<text x="${x(i)}" y="${height - 16}" text-anchor="middle">${i}</text>`);
  }
  parts.push(`<text x="${LEFT + inner / 2}" y="${height - 2}" text-anchor="middle">moves
    (dots: multiples of 4 pixels${width > 480 ? ", whole positions" : ""})</text>`);
  downs.forEach((_, net) => {
    const points = trace
      .map((one, i) => [i, one.sure[net], one.whole])
      .filter(([, p]) => p !== null);
    const line = points.map(([i, p]) => `${x(i).toFixed(1)},${y(p).toFixed(1)}`).join(" ");
    parts.push(
      `<polyline class="line-${net}" stroke-dasharray="${DASHES[net]}" points="${line}"/>`,
    );
    for (const [i, p, whole] of points) {
      if (whole)
        parts.push(
          `<circle class="line-${net}" cx="${x(i).toFixed(1)}" cy="${y(p).toFixed(1)}" r="3.2"/>`,
        );
    }
  });
  box.innerHTML = `${parts.join("")}</svg>`;
}

// What the curves say, in words: the range, and how often the answer changed.
export function summarise(box, trace, downs, classes) {
  box.innerHTML = downs
    .map(({ name }, net) => {
      const known = trace.filter((one) => one.sure[net] !== null);
      if (!known.length) return "";
      const sure = known.map((one) => 100 * one.sure[net]);
      const changes = known.filter(
        (one, i) => i && one.said[net] !== known[i - 1].said[net],
      ).length;
      const others = [...new Set(known.map((one) => one.said[net]))].map((i) => classes[i]);
      return (
        `<p><svg width="34" height="10" aria-hidden="true"><line class="line-${net}" x1="0" x2="34"
      y1="5" y2="5" stroke-dasharray="${DASHES[net]}"/></svg> <b>${name}</b>
      ${Math.min(...sure).toFixed(0)} to ${Math.max(...sure).toFixed(0)} %, ` +
        (changes
          ? `answer changed ${changes}× (${others.join(", ")})`
          : "one answer throughout") +
        "</p>"
      );
    })
    .join("");
}
