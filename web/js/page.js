// What all parts of the page share.

// A JSON file of this page.
export async function load(path) {
  const answer = await fetch(new URL(path, document.baseURI));
  if (!answer.ok) throw new Error(`${path} is not there (${answer.status})`);
  return answer.json();
}

// One visible line instead of a part that silently does nothing.
export function fail(error) {
  const line = document.getElementById("failure");
  line.textContent = `This part does not work here: ${error.message}.`;
  line.hidden = false;
}
