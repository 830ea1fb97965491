// Two ways to show a stream: fragments of MP4 through Media Source Extensions, or JPEG pictures on a canvas.

const KEEP = 20; // seconds behind the playhead that stay in the browser's buffer
const QUICKER = 1.08; // speed with which a small lag is made up, too little to be seen

export const Source = globalThis.ManagedMediaSource ?? globalThis.MediaSource ?? null;

/** The bodies of a box's children, by name: ISO/IEC 14496-12. */
function child(bytes, name, from = 0) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = from; at + 8 <= bytes.length; ) {
    const length = view.getUint32(at);
    if (String.fromCharCode(...bytes.subarray(at + 4, at + 8)) === name) return bytes.subarray(at + 8, at + length);
    if (length < 8) break;
    at += length;
  }
  throw new Error(`the stream's header has no ${name}`);
}

/** The codec that an MP4 header says it holds, as MSE wants it: avc1 and three bytes of avcC in hexadecimal digits. */
export function codec(header) {
  let box = header;
  for (const name of ["moov", "trak", "mdia", "minf", "stbl"]) box = child(box, name);
  const avcC = child(child(child(box, "stsd"), "avc1", 8), "avcC", 78);
  return "avc1." + [...avcC.subarray(1, 4)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Shows MP4 fragments as they come, close behind the newest one. */
export class MsePlayer {
  static format = "m4s";

  constructor(video, chunkSeconds, { onFrame, onProblem }) {
    Object.assign(this, { video, chunkSeconds, onProblem, queue: [], buffer: null, ended: false });
    this.source = new Source();
    this.url = URL.createObjectURL(this.source);
    this.opened = new Promise((resolve) => this.source.addEventListener("sourceopen", resolve, { once: true }));
    video.disableRemotePlayback = true; // without which a ManagedMediaSource never opens
    video.src = this.url;
    video.onerror = () => onProblem(`The browser could not play the video: ${video.error.message || "it does not say why"}.`);
    if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(onFrame);
    else video.addEventListener("loadeddata", onFrame, { once: true });
    this.visible = () => this.follow();
    document.addEventListener("visibilitychange", this.visible);
  }

  async append(bytes) {
    this.queue.push(bytes);
    if (this.buffer) return this.pump();
    const first = this.queue.length === 1;
    await this.opened;
    if (!first || this.buffer || this.source.readyState !== "open") return;
    const type = `video/mp4; codecs="${codec(bytes)}"`;
    if (!Source.isTypeSupported(type)) return this.onProblem(`This browser cannot play ${type}.`);
    this.buffer = this.source.addSourceBuffer(type);
    this.buffer.addEventListener("updateend", () => this.updated());
    this.pump();
  }

  pump() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    if (!this.queue.length) {
      if (this.ended) this.source.endOfStream();
      return;
    }
    try {
      this.buffer.appendBuffer(this.queue[0]);
      this.queue.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      this.trim(1); // and try again when that is done
    }
  }

  updated() {
    this.follow();
    if (!this.trim(KEEP)) this.pump();
  }

  /** Seconds between what is shown and the newest frame that is here. */
  get behind() {
    const ranges = this.video.buffered;
    return ranges.length ? Math.max(0, ranges.end(ranges.length - 1) - this.video.currentTime) : 0;
  }

  /** Play, and jump or hurry to the live edge where the playhead has fallen behind it. */
  follow() {
    const { video, chunkSeconds } = this;
    if (!video.buffered.length) return;
    const edge = video.buffered.end(video.buffered.length - 1);
    if (this.behind > Math.max(1.5, 4 * chunkSeconds)) video.currentTime = Math.max(0, edge - 1.5 * chunkSeconds);
    video.playbackRate = !this.ended && this.behind > 2.5 * chunkSeconds ? QUICKER : 1;
    if (video.paused && !video.ended) video.play().catch(() => {}); // refused or stopped again: the next chunk asks anew
  }

  trim(keep) {
    const ranges = this.video.buffered;
    if (!ranges.length || this.video.currentTime - ranges.start(0) < keep + 2) return false;
    this.buffer.remove(ranges.start(0), this.video.currentTime - keep);
    return true;
  }

  get shown() {
    return this.video.getVideoPlaybackQuality().totalVideoFrames;
  }

  end() {
    this.ended = true;
    this.pump();
  }

  close() {
    document.removeEventListener("visibilitychange", this.visible);
    this.queue = [];
    this.video.onerror = null;
    this.video.removeAttribute("src");
    this.video.load();
    URL.revokeObjectURL(this.url);
  }
}

/** Shows JPEG pictures at the clip's pace. */
export class CanvasPlayer {
  static format = "jpeg";

  constructor(canvas, chunkSeconds, { onFrame }) {
    Object.assign(this, { canvas, chunkSeconds, onFrame, pictures: [], shown: 0, due: 0, closed: false });
    this.context = canvas.getContext("2d");
    this.chain = Promise.resolve(); // pictures are decoded one chunk after another, so they stay in order
    requestAnimationFrame((now) => this.tick(now));
  }

  append(bytes, chunk) {
    this.seconds = this.chunkSeconds / chunk.num_frames;
    return (this.chain = this.chain.then(async () => {
      let at = 0;
      const parts = chunk.payload_lengths.map((length) => bytes.subarray(at, (at += length)));
      const blobs = parts.map((part) => new Blob([part], { type: "image/jpeg" }));
      this.pictures.push(...(await Promise.all(blobs.map((blob) => createImageBitmap(blob)))));
    }));
  }

  tick(now) {
    if (this.closed) return;
    requestAnimationFrame((later) => this.tick(later));
    const ahead = Math.ceil(Math.max(1.5, 4 * this.chunkSeconds) / this.seconds);
    while (this.pictures.length > ahead) this.pictures.shift().close(); // fallen behind: jump to the live edge
    if (!this.pictures.length || now < this.due) return;
    const picture = this.pictures.shift();
    if (!this.shown) Object.assign(this.canvas, { width: picture.width, height: picture.height });
    this.context.drawImage(picture, 0, 0);
    picture.close();
    this.due = Math.max(this.due + 1000 * this.seconds, now - 500 * this.seconds);
    if (this.shown++ === 0) this.onFrame();
  }

  get behind() {
    return this.pictures.length * (this.seconds ?? 0);
  }

  end() {}

  close() {
    this.closed = true;
    for (const picture of this.pictures.splice(0)) picture.close();
  }
}
