"use strict";
// The routes, as openapi.json describes them.

const EXAMPLES = {
  RerankRequest: { query: "who wrote Faust", documents: ["Goethe finished Faust in 1831.", "A fist is a closed hand."], top_n: 1 },
  ScoreRequest: { text_1: "who wrote Faust", text_2: ["Goethe finished Faust in 1831.", "A fist is a closed hand."] },
};

function element(name, text, ...children) {
  const node = document.createElement(name);
  node.textContent = text;
  node.append(...children);
  return node;
}

function typeOf(schema) {
  if (schema.anyOf) return schema.anyOf.map(typeOf).filter((name) => name !== "null").join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items)}`;
  return schema.type ?? "any";
}

function fields(schema) {
  const table = element("table", "");
  for (const [name, field] of Object.entries(schema.properties)) {
    const needed = schema.required?.includes(name) ? " (needed)" : "";
    table.append(element("tr", "", element("td", "", element("code", name)), element("td", typeOf(field) + needed), element("td", field.description ?? "")));
  }
  return table;
}

function article(path, method, route, schemas) {
  const label = element("span", method.toUpperCase());
  label.className = "method";
  const node = element("article", "", element("h2", "", label, element("code", path)), element("p", route.summary ?? ""));
  const reference = route.requestBody?.content["application/json"].schema.$ref;
  const name = reference?.split("/").pop();
  if (name) {
    const body = JSON.stringify(EXAMPLES[name]);
    const command = `curl ${new URL("." + path, location.href).href} -H 'Content-Type: application/json' \\\n  -d '${body}'`;
    node.append(element("pre", "", element("code", command)), fields(schemas[name]));
  }
  return node;
}

async function load() {
  const api = await (await fetch("openapi.json")).json();
  const main = document.getElementById("routes");
  main.append(element("p", api.info.description));
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, route] of Object.entries(methods)) main.append(article(path, method, route, api.components.schemas));
  }
}

load();
