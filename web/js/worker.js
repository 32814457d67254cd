// One thread that runs networks: ONNX Runtime's WebAssembly, which needs no header from the host.
// Asked {id, file, images, dims} it answers {id, outputs: {name: {data, dims}}, ms}, or
// {id, error}.

import * as ort from "../runtime/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("../runtime/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need SharedArrayBuffer, which most static hosts deny

const sessions = new Map();

function open(file) {
  if (!sessions.has(file)) {
    const url = new URL(`../models/${file}`, import.meta.url);
    const opened = fetch(url).then(async (answer) => {
      if (!answer.ok) throw new Error(`${file} is not there (${answer.status})`);
      return ort.InferenceSession.create(new Uint8Array(await answer.arrayBuffer()));
    });
    opened.catch(() => sessions.delete(file)); // so that one can try again
    sessions.set(file, opened);
  }
  return sessions.get(file);
}

async function run({ file, images, dims }) {
  const session = await open(file);
  const input = new ort.Tensor("uint8", images, dims);
  const start = performance.now();
  const found = await session.run({ images: input });
  const ms = performance.now() - start;
  const outputs = {};
  for (const [name, tensor] of Object.entries(found)) {
    outputs[name] = { data: tensor.data.slice(), dims: tensor.dims };
    tensor.dispose();
  }
  return { outputs, ms };
}

// one after the other: a session runs one at a time
let last = Promise.resolve();
self.onmessage = ({ data }) => {
  last = last.then(async () => {
    try {
      if (!data.images) {
        await open(data.file);
        self.postMessage({ id: data.id });
      } else {
        self.postMessage({ id: data.id, ...(await run(data)) });
      }
    } catch (error) {
      self.postMessage({ id: data.id, error: String(error?.message ?? error) });
    }
  });
};
