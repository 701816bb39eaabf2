"use strict";
// Speech is fetched as 24 kHz s16le and played as it comes; nothing is kept, and nothing is loaded from elsewhere.

const RATE = 24000;
const LEAD = 0.1; // seconds of audio ahead of what is heard
const $ = (id) => document.getElementById(id);
let playing = null;

const headers = () => {
  const key = $("speak").elements.key.value;
  return key ? { authorization: `Bearer ${key}` } : {};
};

async function refusal(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function listVoices(chosen) {
  const response = await fetch("v1/audio/voices", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  const { voices } = await response.json();
  $("speak").elements.voice.replaceChildren(...voices.map(({ id, name }) => new Option(name, id, false, id === chosen)));
}

async function showHealth() {
  const about = await (await fetch("health")).json();
  const stages = Object.entries(about.quantization ?? {}).map(([stage, format]) => `${stage} ${format}`);
  const memory = about.memory_bytes ? `${(about.memory_bytes / 1e6).toFixed(0)} MB on the GPU` : "";
  const parts = [about.artifact, ...stages, about.device, memory, about.status];
  $("health").textContent = parts.filter(Boolean).join(" · ");
}

/** Plays s16le as it is pushed; `begun` is when the first sample is heard. */
class Player {
  constructor() {
    this.context = new AudioContext({ sampleRate: RATE });
    this.next = 0;
    this.rest = new Uint8Array(0);
  }
  push(bytes) {
    const data = new Uint8Array(this.rest.length + bytes.length);
    data.set(this.rest);
    data.set(bytes, this.rest.length);
    const count = data.length >> 1;
    this.rest = data.slice(2 * count);
    if (!count) return;
    const view = new DataView(data.buffer);
    const buffer = this.context.createBuffer(1, count, RATE);
    const samples = buffer.getChannelData(0);
    for (let i = 0; i < count; i++) samples[i] = view.getInt16(2 * i, true) / 32768;
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    this.next = Math.max(this.next, this.context.currentTime + LEAD);
    source.start(this.next);
    this.next += buffer.duration;
  }
  async finish() {
    const left = this.next - this.context.currentTime;
    if (left > 0) await new Promise((done) => setTimeout(done, 1000 * left));
    await this.close();
  }
  async close() {
    if (this.context.state !== "closed") await this.context.close();
  }
}

$("speak").addEventListener("submit", async (event) => {
  event.preventDefault();
  playing?.abort();
  const fields = $("speak").elements;
  const body = {
    model: "tts-1",
    input: fields.input.value,
    voice: fields.voice.value,
    speed: Number(fields.speed.value),
    seed: fields.seed.value === "" ? null : Number(fields.seed.value),
    response_format: "pcm",
  };
  const mine = (playing = new AbortController());
  const player = new Player();
  mine.signal.addEventListener("abort", () => player.close());
  const started = performance.now();
  let first = null;
  let bytes = 0;
  $("stop").disabled = false;
  $("said").value = "…";
  try {
    const response = await fetch("v1/audio/speech", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    if (!response.ok) throw await refusal(response);
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      first ??= performance.now() - started;
      bytes += part.value.length;
      player.push(part.value);
      const seconds = (bytes / 2 / RATE).toFixed(1);
      $("said").value = `first audio after ${first.toFixed(0)} ms, ${seconds} s, seed ${response.headers.get("x-seed")}`;
    }
    await player.finish();
  } catch (error) {
    if (error.name !== "AbortError") $("said").value = error.message;
    await player.close();
  } finally {
    if (playing === mine) $("stop").disabled = true;
    showHealth().catch(() => {});
  }
});

$("stop").addEventListener("click", () => playing?.abort());

$("add").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("added").value = "…";
  try {
    const form = new FormData($("add"));
    const response = await fetch("v1/audio/voices", { method: "POST", headers: headers(), body: form });
    if (!response.ok) throw await refusal(response);
    const { id } = await response.json();
    await listVoices(id);
    $("add").reset(); // of the output, too
    $("added").value = `${id} is there`;
  } catch (error) {
    $("added").value = error.message;
  }
});

$("speak").elements.key.addEventListener("change", () => listVoices().catch(() => {}));
listVoices().catch((error) => ($("said").value = error.message));
showHealth().catch(() => {});
