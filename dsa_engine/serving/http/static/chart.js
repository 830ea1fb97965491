// A bar of steps for each chunk with the confidence over it, as an SVG that is drawn anew with every chunk.

const HEIGHT = 196; // pixels
const MARGIN = { left: 26, right: 34, top: 26, bottom: 28 };
const KEEP = 600; // chunks that are remembered

function element(name, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

const least = (confidence) => (confidence ? Math.min(...confidence) : null);

export function words(chunk) {
  const parts = [`Chunk ${chunk.chunk_index}`, `${chunk.steps} ${chunk.steps === 1 ? "step" : "steps"}`];
  if (chunk.confidence) parts.push(`confidence ${least(chunk.confidence).toFixed(2)}`);
  parts.push(`${Math.round(chunk.latency_ms)} ms${chunk.late ? ", late" : ""}`);
  return parts.join(" · ");
}

export class Chart {
  constructor(host, onRead) {
    Object.assign(this, { host, onRead, chunks: [], most: 4 });
    this.svg = element("svg", { role: "img", tabindex: "0" });
    host.append(this.svg);
    for (const kind of ["pointermove", "pointerdown"]) this.svg.addEventListener(kind, (event) => this.read(event));
    this.svg.addEventListener("pointerleave", () => this.onRead(null));
    new ResizeObserver(() => this.draw()).observe(host);
  }

  clear(most) {
    Object.assign(this, { chunks: [], most });
    this.draw();
  }

  add(chunk) {
    this.chunks.push(chunk);
    if (this.chunks.length > KEEP) this.chunks.shift();
    this.draw();
  }

  /** Pixels a chunk. */
  get pitch() {
    return this.width < 480 ? 10 : 14;
  }

  get shown() {
    return this.chunks.slice(-Math.max(1, Math.floor((this.width - MARGIN.left - MARGIN.right) / this.pitch)));
  }

  read(event) {
    const at = event.clientX - this.svg.getBoundingClientRect().left - MARGIN.left;
    this.onRead(this.shown[Math.floor(at / this.pitch)] ?? null);
  }

  draw() {
    this.width = Math.max(120, this.host.clientWidth);
    const bottom = HEIGHT - MARGIN.bottom;
    const shown = this.shown;
    const x = (i) => MARGIN.left + i * this.pitch;
    const y = (share) => bottom - share * (bottom - MARGIN.top); // share: of the full height
    const parts = this.axes(y);
    shown.forEach((chunk, i) => parts.push(this.bar(chunk, x(i), y)));
    parts.push(...this.switches(shown, x), ...this.lines(shown, x, y));
    this.svg.replaceChildren(...parts);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const late = shown.filter((chunk) => chunk.late).length;
    const mean = shown.reduce((sum, chunk) => sum + chunk.steps, 0) / (shown.length || 1);
    const label = `The last ${shown.length} chunks took ${mean.toFixed(1)} of ${this.most} steps on average; ${late} late`;
    this.svg.setAttribute("aria-label", shown.length ? label : "No chunks yet");
  }

  axes(y) {
    const right = this.width - MARGIN.right;
    const parts = [];
    const every = Math.ceil(this.most / 5);
    for (let steps = 0; steps <= this.most; steps += every) {
      const at = y(steps / this.most);
      parts.push(element("line", { class: "grid", x1: MARGIN.left, x2: right, y1: at, y2: at }));
      parts.push(element("text", { class: "tick", x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, steps));
    }
    for (const confidence of [0, 0.5, 1]) {
      const at = y(confidence) + 4;
      parts.push(element("text", { class: "tick confident", x: right + 8, y: at }, confidence));
    }
    return parts;
  }

  bar(chunk, x, y) {
    const top = y(chunk.steps / this.most);
    const shade = this.most > 1 ? (chunk.steps - 1) / (this.most - 1) : 1;
    const group = element("g");
    group.append(
      element("title", {}, words(chunk)),
      element("rect", {
        class: chunk.late ? "bar late" : "bar", x: x + 1.5, y: top, width: this.pitch - 3, height: y(0) - top, rx: 2,
        style: `--shade: ${Math.round(30 + 70 * shade)}%`,
      }),
    );
    if (chunk.late) {
      const [left, under] = [x + this.pitch / 2, y(0) + 4];
      group.append(element("path", { class: "late-mark", d: `M${left - 4} ${under + 7}h8l-4 -7z` }));
    }
    if (chunk.chunk_index % 10 === 0)
      group.append(
        element("text", { class: "tick", x: x + this.pitch / 2, y: HEIGHT - 2, "text-anchor": "middle" }, chunk.chunk_index),
      );
    return group;
  }

  /** A dashed line and the new prompt where it came into force. */
  switches(shown, x) {
    const firsts = shown.flatMap((chunk, i) => (i > 0 && chunk.prompt !== shown[i - 1].prompt ? [i] : []));
    return firsts.flatMap((i, n) => {
      const room = ((firsts[n + 1] ?? shown.length + 1) - i) * this.pitch;
      const space = n === firsts.length - 1 ? this.width - MARGIN.right - x(i) : room;
      const letters = Math.floor(space / 6.2) - 1; // pixels of a letter of the label's size
      const prompt = shown[i].prompt ?? "";
      const text = prompt.length > letters ? prompt.slice(0, Math.max(0, letters - 1)).trimEnd() + "…" : prompt;
      return [
        element("line", { class: "switch", x1: x(i), x2: x(i), y1: 6, y2: HEIGHT - MARGIN.bottom }),
        ...(letters > 5 ? [element("text", { class: "prompt", x: x(i) + 5, y: 14 }, text)] : []),
      ];
    });
  }

  lines(shown, x, y) {
    const parts = [];
    const threshold = shown.map((chunk, i) =>
      chunk.threshold === null ? "" : `M${x(i)} ${y(chunk.threshold)}h${this.pitch}`,
    );
    parts.push(element("path", { class: "threshold", d: threshold.join("") }));
    const points = shown.flatMap((chunk, i) =>
      chunk.confidence ? [[x(i) + this.pitch / 2, y(least(chunk.confidence))]] : [],
    );
    parts.push(element("polyline", { class: "confidence", points: points.map((point) => point.join(",")).join(" ") }));
    for (const [cx, cy] of points) parts.push(element("circle", { class: "confidence-dot", cx, cy, r: this.pitch < 12 ? 2 : 2.6 }));
    return parts;
  }
}
