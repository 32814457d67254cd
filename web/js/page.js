// What all parts of the page share.

// A JSON file of this page.
export async function load(path) {
  const answer = await fetch(new URL(path, document.baseURI));
  if (!answer.ok) throw new Error(`${path} is not there (${answer.status})`);
  return answer.json();
}

// One visible line instead of a part that silently does nothing, until it works again.
export function fail(part, error) {
  const line = document.querySelector(`#${part} > .failure`);
  line.textContent = `This part does not work here: ${error.message}.`;
  line.hidden = false;
}

export function works(part) {
  document.querySelector(`#${part} > .failure`).hidden = true;
}

// Calls draw whenever the box has another width; not while it is hidden, when it has none.
export function onWidth(box, draw) {
  let drawn = box.clientWidth;
  new ResizeObserver(() => {
    if (!box.clientWidth || box.clientWidth === drawn) return;
    drawn = box.clientWidth;
    draw();
  }).observe(box);
}
