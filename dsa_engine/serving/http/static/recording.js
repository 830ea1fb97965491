// The received video, for the download.

const MAX_BYTES = 256 * 2 ** 20;

export class Recording {
  parts = [];
  bytes = 0;
  frames = 0;
  full = false; // the limit was reached: only the beginning is kept

  add(bytes, frames) {
    this.full ||= this.bytes + bytes.length > MAX_BYTES;
    if (this.full) return;
    this.parts.push(bytes);
    this.bytes += bytes.length;
    this.frames += frames;
  }

  describe(fps) {
    const size = this.bytes < 2 ** 20 ? `${Math.ceil(this.bytes / 1024)} kB` : `${(this.bytes / 2 ** 20).toFixed(1)} MB`;
    return `${(this.frames / fps).toFixed(1)} s, ${size}${this.full ? " (full: the beginning, as much as is kept)" : ""}`;
  }

  save(title) {
    const url = URL.createObjectURL(new Blob(this.parts, { type: "video/mp4" }));
    const name = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60).replace(/^-|-$/g, "");
    Object.assign(document.createElement("a"), { href: url, download: `${name || "video"}.mp4` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}
