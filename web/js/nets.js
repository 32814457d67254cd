// The networks, each in a thread of its own where the machine has several.

const threads = Math.max(1, Math.min(3, navigator.hardwareConcurrency || 1));
const workers = [];
const waiting = new Map();
let asked = 0;

function worker(i) {
  const slot = i % threads;
  if (!workers[slot]) {
    const made = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    made.onmessage = ({ data }) => {
      const { resolve, reject } = waiting.get(data.id);
      waiting.delete(data.id);
      if (data.error) reject(new Error(data.error));
      else resolve(data);
    };
    made.onerror = (event) => {
      event.preventDefault();
      made.terminate();
      workers[slot] = null; // so that one can try again
      for (const [id, { reject, by }] of waiting) {
        if (by !== made) continue; // the other workers will answer
        waiting.delete(id);
        reject(new Error(event.message || "the runtime cannot be loaded"));
      }
    };
    workers[slot] = made;
  }
  return workers[slot];
}

function ask(slot, message, transfer = []) {
  const id = ++asked;
  return new Promise((resolve, reject) => {
    const by = worker(slot);
    waiting.set(id, { resolve, reject, by });
    by.postMessage({ id, ...message }, transfer);
  });
}

// Loads a file, so that the first prediction is quick.
export const prepare = (slot, file) => ask(slot, { file });

// images uint8 of shape dims (N, C, H, W) -> {outputs: {logits, maps?}, ms}, each {data, dims}.
export const predict = (slot, file, images, dims) => ask(slot, { file, images, dims });
