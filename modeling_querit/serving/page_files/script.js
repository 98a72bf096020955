"use strict";
// The page: reads query and documents, asks this server for their order, and for the best passage of a document.

const $ = (id) => document.getElementById(id);
// Documents whose best passage is looked for at once; that of others when they are opened.
const HIGHLIGHTED = 5;
const MAX_PASSAGES = 48;
// Characters before the best passage in a text that is not open.
const CONTEXT = 60;
const EXAMPLE = {
  query: "how do I find a word in all files of a folder",
  documents: [
    "ls -l shows sizes and owners. It sorts by name unless told otherwise.",
    "To count the words of a file, use wc -w. Other options count its lines and bytes.",
    "grep searches files for lines that match a pattern. To search all files of a folder, call grep -r word folder.",
    "A word processor is a program for writing letters.",
    "find looks for files by their name, size or age. It does not read what is in them.",
    "Mit grep -r sucht man ein Wort in allen Dateien eines Ordners. Die Option -i beachtet Groß- und Kleinschreibung nicht.",
  ],
};

let running = null;
let shown = null;

// --- documents -------------------------------------------------------------------------------------------------------

function parseDocuments(text) {
  const trimmed = text.trim();
  if (!trimmed) return [];
  if (trimmed.startsWith("[")) {
    try {
      const list = JSON.parse(trimmed);
      if (Array.isArray(list)) return list.map(asDocument);
    } catch { /* Not JSON: lines of text. */ }
  }
  const lines = trimmed.split(/\r?\n/).filter((line) => line.trim());
  if (!lines[0].trimStart().startsWith("{")) return lines;
  return lines.map((line, index) => {
    try {
      return asDocument(JSON.parse(line));
    } catch {
      throw new Error(`Line ${index + 1} of the documents is not JSON with a "text".`);
    }
  });
}

function asDocument(value) {
  if (typeof value === "string") return value;
  if (value === null || typeof value !== "object" || typeof value.text !== "string") throw new Error("no text");
  const { text, title } = value;
  return typeof title === "string" && title ? { title, text } : { text };
}

const textOf = (given) => (typeof given === "string" ? given : given.text);
const titleOf = (given) => (typeof given === "string" ? "" : given.title ?? "");

function showCount() {
  let count = 0;
  try {
    count = parseDocuments($("documents").value).length;
  } catch { /* Said when it is sent. */ }
  $("count").textContent = count ? `${count} document${count === 1 ? "" : "s"}` : "one per line, or JSONL";
}

async function readFile(file) {
  if (!file) return;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new Error("binary");
    $("documents").value = text;
    $("error").hidden = true;
    showCount();
  } catch {
    showError(`${file.name} is not a text file in UTF-8: save its texts as one, one per line.`);
  }
}

// --- server ----------------------------------------------------------------------------------------------------------

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const token = $("token").value;
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  }
  if (response.status === 401) {
    $("locked").hidden = false;
    $("token").focus();
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error?.message ?? `The server answered ${response.status}.`);
  return answer;
}

function requestBody() {
  const body = { query: $("query").value, documents: parseDocuments($("documents").value) };
  if ($("instruction").value) body.instruction = $("instruction").value;
  if ($("top").value) body.top_n = Number($("top").value);
  if (!body.documents.length) throw new Error("There are no documents: paste some, one per line.");
  return body;
}

async function submit() {
  running?.abort();
  const mine = (running = new AbortController());
  $("error").hidden = true;
  $("submit").setAttribute("aria-busy", "true");
  $("results").classList.add("old");
  try {
    const body = requestBody();
    const start = performance.now();
    const answer = await post("rerank", { ...body, return_documents: false }, mine.signal);
    show(body, answer, (performance.now() - start) / 1000);
    await highlightBest(body, answer.results.slice(0, HIGHLIGHTED), mine.signal);
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
  } finally {
    if (mine === running) {
      $("submit").removeAttribute("aria-busy");
      $("results").classList.remove("old");
    }
  }
}

// --- best passages ---------------------------------------------------------------------------------------------------

function passages(text) {
  let parts;
  if (Intl.Segmenter) {
    const segmenter = new Intl.Segmenter(undefined, { granularity: "sentence" });
    parts = [...segmenter.segment(text)].map(({ index, segment }) => [index, index + segment.length]);
  } else {
    parts = [...text.matchAll(/[^.!?。！？\n]+[.!?。！？\n]*\s*/g)].map((match) => [match.index, match.index + match[0].length]);
  }
  const together = Math.ceil(parts.length / MAX_PASSAGES);
  const joined = [];
  for (let first = 0; first < parts.length; first += together) {
    joined.push([parts[first][0], parts[Math.min(first + together, parts.length) - 1][1]]);
  }
  return joined.filter(([start, end]) => text.slice(start, end).trim());
}

async function highlightBest(body, results, signal) {
  const wanted = results
    .map(({ index }) => ({ index, parts: passages(textOf(body.documents[index])) }))
    .filter(({ parts }) => parts.length > 1);
  const pairs = wanted.flatMap(({ index, parts }) => parts.map(([start, end]) => textOf(body.documents[index]).slice(start, end)));
  if (!pairs.length) return;
  const request = { text_1: body.query, text_2: pairs };
  if (body.instruction) request.instruction = body.instruction;
  const scores = (await post("score", request, signal)).data.map(({ score }) => score);
  for (const { index, parts } of wanted) {
    const own = scores.splice(0, parts.length);
    shown.best.set(index, parts[own.indexOf(Math.max(...own))]);
    renderText(index);
  }
}

// --- results ---------------------------------------------------------------------------------------------------------

function element(name, className, text = "") {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;
  return node;
}

function show(body, answer, seconds) {
  shown = { body, best: new Map(), rows: new Map() };
  const rows = answer.results.map((result, rank) => row(body, result, rank));
  $("results").replaceChildren(...rows);
  $("results").classList.remove("old");
  $("empty").hidden = true;
  $("summary").hidden = false;
  const count = body.documents.length;
  const tokens = answer.usage.total_tokens.toLocaleString("en");
  $("status").textContent = `${count} document${count === 1 ? "" : "s"}, ${tokens} tokens, ${seconds.toFixed(2)} s`;
}

function row(body, { index, relevance_score: score }, rank) {
  const item = element("li", "");
  item.tabIndex = 0;
  item.dataset.index = index;
  const head = element("div", "head");
  const bar = element("span", "bar");
  bar.append(element("i", ""));
  bar.firstChild.style.setProperty("--share", ((score + 1) / 2).toFixed(4));
  const moved = index - rank;
  const arrow = moved > 0 ? `▲ ${moved}` : moved < 0 ? `▼ ${-moved}` : "";
  const place = element("span", "moved", arrow);
  place.title = `Document ${index + 1} as given`;
  const sign = score < 0 ? "−" : "+";
  head.append(element("span", "rank", rank + 1), bar, element("span", "score", sign + Math.abs(score).toFixed(3)), place);
  item.append(head);
  const title = titleOf(body.documents[index]);
  if (title) item.append(element("p", "title", title));
  item.append(element("p", "text"));
  shown.rows.set(index, item);
  renderText(index);
  return item;
}

function renderText(index) {
  const item = shown.rows.get(index);
  const text = textOf(shown.body.documents[index]);
  const [start, end] = shown.best.get(index) ?? [0, 0];
  const passage = text.slice(start, end).trimEnd();
  const isFar = !item.classList.contains("open") && start > 3 * CONTEXT;
  const from = isFar ? start - CONTEXT : 0;
  const node = item.querySelector(".text");
  node.replaceChildren((isFar ? "… " : "") + text.slice(from, start));
  if (passage) node.append(element("mark", "", passage));
  node.append(text.slice(start + passage.length));
}

async function toggle(item) {
  const index = Number(item.dataset.index);
  item.classList.toggle("open");
  renderText(index);
  if (item.classList.contains("open") && !shown.best.has(index)) {
    try {
      await highlightBest(shown.body, [{ index }]);
    } catch (error) {
      showError(error.message);
    }
  }
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = false;
}

// --- copying ---------------------------------------------------------------------------------------------------------

const address = () => new URL("rerank", location.href).href;

function asCurl(body) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const token = $("token").value ? ` -H "Authorization: Bearer $QUERIT_API_KEY"` : "";
  return `curl ${address()} -H 'Content-Type: application/json'${token} \\\n  -d ${quote(JSON.stringify(body))}`;
}

function asPython(body) {
  const token = $("token").value ? `\n    headers={"Authorization": f"Bearer {os.environ['QUERIT_API_KEY']}"},` : "";
  // Strings, lists and objects are written alike in JSON and Python.
  const json = JSON.stringify(body, null, 4).replaceAll("\n", "\n    ");
  return `${token ? "import os\n\n" : ""}import requests

response = requests.post(
    ${JSON.stringify(address())},
    json=${json},${token}
)
for result in response.json()["results"]:
    print(result["index"], result["relevance_score"])
`;
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https, browsers have only the old way.
    const area = element("textarea", "", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1200);
}

// --- events ----------------------------------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}

if (localStorage.getItem("theme")) setTheme(localStorage.getItem("theme"));
$("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark";
  setTheme(isDark ? "light" : "dark");
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("documents").addEventListener("input", showCount);
$("file").addEventListener("change", () => readFile($("file").files[0]));
$("choose").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") $("file").click();
});
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") {
      const file = event.dataTransfer.files[0];
      if (file) readFile(file);
    }
  });
}
$("example").addEventListener("click", () => {
  $("query").value = EXAMPLE.query;
  $("documents").value = EXAMPLE.documents.join("\n");
  showCount();
});
$("curl").addEventListener("click", () => copy($("curl"), asCurl(shown.body)));
$("python").addEventListener("click", () => copy($("python"), asPython(shown.body)));
$("results").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  // Not while somebody selects text.
  if (item && !getSelection().toString()) toggle(item);
});
document.addEventListener("keydown", (event) => {
  const isTyping = ["INPUT", "TEXTAREA"].includes(document.activeElement.tagName);
  const item = document.activeElement.closest("#results li");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("form").requestSubmit();
  } else if (event.key === "/" && !isTyping) {
    event.preventDefault();
    $("query").select();
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !isTyping) {
    const rows = [...$("results").children];
    const next = rows[rows.indexOf(item) + (event.key === "ArrowDown" ? 1 : -1)];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  } else if (event.key === "Enter" && item) {
    toggle(item);
  }
});
fetch("v1/models", $("token").value ? { headers: { Authorization: `Bearer ${$("token").value}` } } : {})
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error("locked"))))
  .then(({ data: [model] }) => {
    $("model").textContent = model.id;
    $("model").title = `Reads at most ${model.max_model_len} tokens of a query and document together`;
  })
  .catch(() => ($("locked").hidden = false));
