// Elements and numbers.

const byId = (id) => document.getElementById(id);

/** An element; `text` becomes its text, functions become listeners, the rest attributes. */
function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") node.textContent = value;
    else if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const drawn = (tag) => document.createElementNS(document.querySelector("svg").namespaceURI, tag);

/** One of the signs in the template; without a label it only decorates text that says the same. */
function sign(name, label) {
  const [svg, use] = [drawn("svg"), drawn("use")];
  svg.setAttribute("class", `sign ${name}`);
  svg.setAttribute("role", label ? "img" : "presentation");
  if (label) {
    svg.setAttribute("aria-label", label);
    const title = drawn("title");
    title.textContent = label;
    svg.append(title);
  }
  use.setAttribute("href", `#sign-${name}`);
  svg.append(use);
  return svg;
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const clamp = (number, low, high) => Math.min(Math.max(number, low), high);
const plural = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

function scaled(number, base, units) {
  let unit = 0;
  while (Math.abs(number) >= base - 0.5 && unit < units.length - 1) {
    number /= base;
    unit += 1;
  }
  const digits = unit === 0 || Math.abs(number) >= 99.5 ? 0 : 1;
  return `${number.toFixed(digits)} ${units[unit]}`.trim();
}

const size = (bytes) => scaled(bytes, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const amount = (number) =>
  Math.abs(number) < 1e5 ? number.toLocaleString("en") : scaled(number, 1000, ["", "k", "M", "G", "T"]);
const seconds = (number) => `${number.toFixed(number < 10 ? 2 : 1)} s`;
const signed = (number, show) => `${number < 0 ? "−" : "+"}${show(Math.abs(number))}`;

/** Errors as 4.6e-07; inf and nan travel as text. */
const tiny = (number) =>
  typeof number === "string"
    ? number
    : number
        .toExponential(1)
        .replace(/e([+-])(\d)$/, "e$10$2")
        .replace("e-", "e−");

function percent(from, to) {
  if (!from || from === to) return "";
  const change = (100 * (to - from)) / from;
  if (Math.abs(change) < 0.05) return "";
  const isFine = Math.abs(change) < 9.95 || (to > 0 && change < -99); // 422 to 1 is not -100 %
  return `${signed(isFine ? Number(change.toFixed(1)) : Math.round(change), String)} %`;
}

/** 0–3, 5 for 0, 1, 2, 3, 5. */
function ranges(numbers) {
  const parts = [];
  for (const number of [...new Set(numbers)].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([from, to]) => (from === to ? from : `${from}–${to}`)).join(", ");
}

const layerName = (layer) => (layer === null ? "outside the layers" : `layer ${layer}`);

function groupTitle(group) {
  if (group.layers.length === 1) return layerName(group.layers[0]);
  return `layers ${ranges(group.layers)}`;
}

function grouped(things, key) {
  const groups = new Map();
  for (const thing of things) {
    const name = key(thing);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(thing);
  }
  return groups;
}
