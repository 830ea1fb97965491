// The page: one live stream over `WS /v1/realtime/video`, its controls and its statistics.

import { Chart, words } from "./chart.js";
import { CanvasPlayer, MsePlayer, Source } from "./player.js";
import { Recording } from "./recording.js";
import { remember, subprotocols, tokenFrom } from "./token.js";

const PING_MS = 10_000; // between keepalives
const RECENT = 24; // chunks that the statistics cover

const $ = (id) => document.getElementById(id);
const here = new URL(location.href);
const show = (node, visible) => (node.hidden = !visible);

let token = tokenFrom(here);
let model = null;
let stream = null; // the current one, or the last
let recording = null;

const chart = new Chart($("chart"), (chunk) => readout(chunk ?? stream?.last));

// The model.

async function askModel() {
  try {
    const answer = await fetch("v1/models", { headers: token ? { Authorization: `Bearer ${token}` } : {} });
    show($("token-form"), answer.status === 401);
    remember(token, answer.status !== 401);
    if (answer.status === 401) {
      $("model").textContent = "Locked";
      if (token) problem("That token is not the right one.", false);
      return;
    }
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    model = (await answer.json()).data[0];
  } catch (error) {
    $("model").textContent = "No server";
    return problem(`The server cannot be reached: ${error.message}.`, false);
  }
  const [width, height] = model.size.split("x").map(Number);
  Object.assign(model, { width, height });
  const steps = `up to ${model.max_steps} ${model.max_steps === 1 ? "step" : "steps"} a chunk`;
  $("model").textContent = `${model.id} · ${width} × ${height} · ${model.fps} fps · ${steps}`;
  document.documentElement.style.setProperty("--aspect", `${width} / ${height}`);
  document.body.classList.toggle("small-picture", width < 256);
  chart.clear(model.max_steps);
  offerWords(model.prompts);
  offerQuality();
  $("go").disabled = false;
  problem(null);
}

// The prompt. A grammar such as "a <red|green> <circle|square> [on <black|navy>]" becomes words to tap.

let grammar = null; // { template, groups: [[word]] }

function offerWords(text) {
  $("prompt").placeholder = text ? "" : "A lighthouse in a storm, waves breaking over the rocks";
  if (!text) return;
  const groups = [...text.matchAll(/<([^<>]+)>/g)].map((match) => match[1].split("|"));
  grammar = { template: text.replace(/[[\]]/g, ""), groups };
  $("words").replaceChildren(
    ...groups.map((group, g) => {
      const row = document.createElement("div");
      row.className = "chips";
      row.append(...group.map((word) => chip(word, () => choose(g, word))));
      return row;
    }),
  );
  show($("words"), true);
  show($("surprise"), true);
  if (!$("prompt").value) $("prompt").value = compose(groups.map((group) => group[0]));
  pressWords();
}

function chip(text, onClick) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", onClick);
  return button;
}

const inPrompt = (word) => ` ${$("prompt").value.trim().replace(/\s+/g, " ")} `.includes(` ${word} `);

function compose(chosen) {
  let g = 0;
  return grammar.template.replace(/<[^<>]+>/g, () => chosen[g++]);
}

function choose(g, word) {
  const chosen = grammar.groups.map((group, i) => (i === g ? word : (group.find(inPrompt) ?? group[0])));
  $("prompt").value = compose(chosen);
  pressWords();
}

function pressWords() {
  for (const button of $("words").querySelectorAll("button"))
    button.setAttribute("aria-pressed", inPrompt(button.textContent));
}

// Quality and speed.

function offerQuality() {
  show($("quality"), model.confidence_threshold !== null);
  if (model.confidence_threshold === null) return;
  $("threshold").value = model.confidence_threshold;
  $("presets").replaceChildren(
    ...Object.entries(model.presets).map(([name, value]) =>
      chip(name, () => {
        $("threshold").value = value;
        changeThreshold();
      }),
    ),
  );
  showThreshold();
}

const relative = () => $("policy").value === "relative"; // each chunk to the one before: no threshold

function showThreshold() {
  const value = Number($("threshold").value);
  $("threshold-value").textContent = value.toFixed(2);
  for (const button of $("presets").children) {
    const pressed = Math.abs(model.presets[button.textContent] - value) < 0.006;
    button.setAttribute("aria-pressed", pressed);
  }
}

function changeThreshold() {
  showThreshold();
  stream?.change({ confidence_threshold: Number($("threshold").value) });
}

// One stream.

class Stream {
  constructor() {
    this.began = performance.now();
    this.chunks = []; // metadata of the most recent
    this.count = this.lates = this.asked = 0;
    this.changes = new Map(); // by id of the interaction
    this.next = null; // metadata of the next binary message
    this.closed = false;
    this.samples = []; // [milliseconds, frames shown]
    const seconds = 1 / model.fps; // until the first chunk tells its length
    const events = {
      onFrame: () => {
        $("first").textContent = milliseconds(performance.now() - this.began);
        veil(null);
      },
      onProblem: (text) => this.fail(text),
    };
    const canvas = wantsCanvas();
    show($("video"), !canvas);
    show($("canvas"), canvas);
    this.player = canvas ? new CanvasPlayer($("canvas"), seconds, events) : new MsePlayer($("video"), seconds, events);
    this.format = this.player.constructor.format;
    this.connect();
  }

  connect() {
    const address = new URL("v1/realtime/video", here);
    address.protocol = address.protocol.replace("http", "ws");
    address.search = "";
    this.socket = new WebSocket(address, subprotocols(token));
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => {
      const threshold = { confidence_threshold: Number($("threshold").value) };
      const policy = model.confidence_threshold === null ? {} : relative() ? { step_policy: "relative" } : threshold;
      const seed = Number.isSafeInteger(Number($("seed").value)) ? Number($("seed").value) : 0;
      this.send("session.start", { model: model.id, prompt: $("prompt").value, format: this.format, seed, ...policy });
    };
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.receive(JSON.parse(data)) : this.receiveChunk(data));
    this.socket.onclose = ({ code }) => this.onClose(code);
    this.pinging = setInterval(() => this.send("session.ping"), PING_MS);
  }

  send(type, fields = {}) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }

  change(event) {
    if (this.closed || this.socket.readyState !== WebSocket.OPEN) return;
    const event_id = `change-${++this.asked}`;
    this.changes.set(event_id, event);
    this.send("session.interaction", { interaction: { event_id, event } });
  }

  stop() {
    this.ending = { type: "session.done", reason: "stopped" };
    state("stopping");
    if (this.socket.readyState === WebSocket.OPEN) this.send("session.stop");
    else this.socket.close();
  }

  receive(message) {
    const handler = {
      "session.queued": () => {
        state("queued");
        veil(`All places are taken. You are number ${message.position} in the queue.`);
      },
      "video.start": () => {
        state("running");
        veil("The first chunk is being made …");
      },
      "video.chunk_metadata": () => (this.next = message),
      "session.interaction.queued": () => this.showChange(message.event_id, "queued …"),
      "session.interaction.applied": () => {
        this.showChange(message.event_id, `in force from chunk ${message.chunk_index}`);
        this.changes.delete(message.event_id);
      },
      "session.done": () => (this.ending = message),
      error: () => this.reject(message),
    }[message.type];
    handler?.();
  }

  showChange(id, words) {
    const event = this.changes.get(id);
    if (event?.prompt) $("change").textContent = `New prompt ${words}`;
    else if (event) $("lowered").textContent = `New threshold ${words}`;
  }

  reject(error) {
    problem(error.message);
    if (this.changes.has(error.event_id)) {
      this.showChange(error.event_id, "refused");
      this.changes.delete(error.event_id);
    } else {
      this.ending = error;
      if (document.body.dataset.state === "connecting") this.socket.close(); // the start was not possible
    }
  }

  receiveChunk(data) {
    const [chunk, bytes] = [this.next, new Uint8Array(data)];
    this.player.chunkSeconds = chunk.num_frames / model.fps;
    Promise.resolve(this.player.append(bytes, chunk)).catch((error) => this.fail(`${error.message}.`));
    if (this.format === "m4s") recording.add(bytes, chunk.num_frames);
    showRecording();
    this.last = chunk;
    this.chunks.push(chunk);
    if (this.chunks.length > RECENT) this.chunks.shift();
    this.count += 1;
    this.lates += chunk.late;
    chart.add(chunk);
    readout(chunk);
    this.showStatistics(chunk);
  }

  showStatistics(chunk) {
    const mean = this.chunks.reduce((sum, { steps }) => sum + steps, 0) / this.chunks.length;
    const latencies = this.chunks.map((c) => c.latency_ms).sort((a, b) => a - b);
    $("count").textContent = this.count;
    $("steps").textContent = `${mean.toFixed(1)} of ${model.max_steps}`;
    $("latency").textContent = milliseconds(latencies[latencies.length >> 1]);
    $("late").textContent = `${this.lates} of ${this.count}`;
    $("behind").textContent = milliseconds(1000 * this.player.behind);
    const now = performance.now();
    this.samples.push([now, this.player.shown]);
    while (this.samples.length > 2 && now - this.samples[0][0] > 5000) this.samples.shift();
    const [then, before] = this.samples[0];
    if (now - then > 1500) $("fps").textContent = ((1000 * (this.player.shown - before)) / (now - then)).toFixed(1);
    const wanted = Number($("threshold").value);
    if (chunk.threshold !== null && chunk.threshold < wanted - 0.006 && !relative())
      $("lowered").textContent = `Lowered to ${chunk.threshold.toFixed(2)} under load`;
    else if ($("lowered").textContent.startsWith("Lowered")) $("lowered").textContent = "";
  }

  fail(text) {
    this.ending = { type: "error", message: text };
    problem(text, true);
    this.socket.close();
  }

  onClose(code) {
    clearInterval(this.pinging);
    this.closed = true;
    this.player.end();
    state("idle");
    const { type, reason, message, retryable = true } = this.ending ?? {};
    if (!this.count) veil("Say what you want to see");
    if (type === "error") problem(message, retryable);
    else if (type !== "session.done") problem(`The connection was lost${code === 1006 ? "" : ` (code ${code})`}.`, true);
    else if (!["done", "stopped"].includes(reason)) problem(ENDINGS[reason] ?? message ?? reason, true);
  }

  close() {
    this.closed = true;
    this.socket.onclose = this.socket.onmessage = null;
    clearInterval(this.pinging);
    this.socket.close();
    this.player.close();
  }
}

const ENDINGS = {
  shutdown: "The server is stopping.",
  idle: "The server heard nothing from this page for too long and closed the stream.",
  lifetime: "The stream has lasted as long as this server lets one last.",
};

/** Without Media Source Extensions (older iPhones), or where the address asks for it: ?format=jpeg. */
function wantsCanvas() {
  const canvas = !Source;
  show($("fallback"), canvas);
  return canvas || here.searchParams.get("format") === "jpeg";
}

// What the page shows.

function state(name) {
  document.body.dataset.state = name;
  const open = name !== "idle";
  $("go").textContent = open ? "Change prompt" : "Start";
  $("go").disabled = !["idle", "running", "queued"].includes(name);
  $("stop").disabled = !["running", "queued", "connecting"].includes(name);
  $("seed").disabled = $("policy").disabled = open; // of a stream's start
  show($("live"), name === "running");
}

function veil(text) {
  show($("veil"), text !== null);
  if (text !== null) $("veil").textContent = text;
}

function problem(text, again = false) {
  show($("problem"), text !== null);
  $("problem-words").textContent = text ?? "";
  show($("reconnect"), again);
}

function readout(chunk) {
  $("readout").textContent = chunk ? words(chunk) : "Bars appear here as chunks arrive.";
}

function showRecording() {
  const empty = !recording.parts.length;
  $("download").disabled = empty;
  const none = wantsCanvas() ? "Not of JPEG pictures." : "What you have seen, as a file.";
  $("recorded").textContent = empty ? none : recording.describe(model.fps);
}

const milliseconds = (value) => (value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);

function begin() {
  stream?.close();
  problem(null);
  for (const id of ["fps", "steps", "latency", "first", "late", "behind"]) $(id).textContent = "–";
  $("count").textContent = "0";
  $("change").textContent = $("lowered").textContent = "";
  chart.clear(model.max_steps);
  readout(null);
  state("connecting");
  veil("Connecting …");
  recording = new Recording();
  showRecording();
  stream = new Stream();
}

function submit() {
  if (!$("prompt-form").reportValidity() || $("go").disabled) return;
  problem(null);
  if (document.body.dataset.state === "idle") begin();
  else stream.change({ prompt: $("prompt").value });
}

$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("input", pressWords);
$("stop").addEventListener("click", () => stream.stop());
$("surprise").addEventListener("click", () => {
  $("prompt").value = compose(grammar.groups.map((group) => group[Math.floor(Math.random() * group.length)]));
  pressWords();
});
$("policy").addEventListener("change", () => show($("by-threshold"), !relative()));
$("threshold").addEventListener("input", showThreshold);
$("threshold").addEventListener("change", changeThreshold);
$("reconnect").addEventListener("click", () => (model ? begin() : askModel()));
$("download").addEventListener("click", () => recording.save($("prompt").value));
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  problem(null);
  askModel();
});

askModel();
