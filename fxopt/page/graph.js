// The graph before and after the selected stage, side by side, layers that look alike once.

/** The file that most lines come from; only its line numbers stand in the margin. */
const mainFile = (() => {
  const files = grouped(
    lines.map(([, , source]) => strings[source].replace(/:\d+$/, "")).filter((file) => file !== "?"),
    (file) => file,
  );
  return [...files].sort((a, b) => b[1].length - a[1].length)[0]?.[0] ?? "";
})();

function marginNumber(source) {
  const [, file, number] = /^(.*):(\d+)$/.exec(source) ?? [];
  return file === mainFile ? number : "·";
}

function drawGraph() {
  const stage = stages[state.stage];
  const graph = byId("graph");
  const pictures = [...byId("memory").querySelectorAll("figure")];
  for (const picture of pictures) picture.hidden = picture.dataset.stage !== stage.name || stage.state === "dropped";
  byId("memory").hidden = pictures.every((picture) => picture.hidden);
  graph.hidden = byId("card").hidden = stage.kind === "code" && !stage.groups.length;
  if (!stage.groups.length) {
    graph.replaceChildren(el("p", { class: "empty", text: "There is no graph: the pass failed before it made one." }));
    return;
  }
  graph.replaceChildren(graphHead(stage), ...stage.groups.map((group, index) => groupSection(index)));
  graph.querySelector(".cell")?.setAttribute("tabindex", "0");
}

function graphHead(stage) {
  const earlier = stageBefore(state.stage);
  const changed = stage.groups.some((group) => group.changed);
  const step = (title, by, text) =>
    el("button", { type: "button", class: "button", title, "aria-label": title, text, click: () => moveChange(by) });
  const isOpen = () =>
    state.graphs[state.stage].every((view, index) => view.open && (view.all || !stage.groups[index].changed));
  const tools = el(
    "span",
    { class: "tools" },
    el("span", { class: "file", text: mainFile ? `line numbers: ${mainFile}` : "" }),
    changed ? step("Previous change (p)", -1, "↑") : null,
    changed ? step("Next change (n)", 1, "↓") : null,
    el("button", {
      type: "button",
      class: "button all",
      text: isOpen() ? "Fold" : "Open all lines",
      click: () => openAll(!isOpen()),
    }),
  );
  const title = (before, name) => el("span", {}, before, el("b", { text: name }));
  const titles = earlier
    ? [title("− before: the graph after ", earlier.name), title("+ after ", stage.name)]
    : [title("the graph after ", stage.name), el("span")];
  return el("div", { class: "graph-head" }, ...titles, tools);
}

function openAll(open) {
  const stage = stages[state.stage];
  state.graphs[state.stage].forEach((view, index) => {
    view.open = open || stage.groups[index].changed;
    view.all = open;
    view.opened.clear();
  });
  drawGraph();
  byId("graph").querySelector(".all").focus();
}

function redrawGroup(index, focus) {
  const section = groupSection(index);
  byId("graph").querySelector(`[data-group="${index}"]`).replaceWith(section);
  if (!byId("graph").querySelector('.cell[tabindex="0"]'))
    byId("graph").querySelector(".cell")?.setAttribute("tabindex", "0");
  if (!state.cell?.isConnected) showCard(null);
  if (focus) section.querySelector(focus)?.focus();
  return section;
}

function groupSection(index) {
  const group = stages[state.stage].groups[index];
  const view = state.graphs[state.stage][index];
  const section = el(
    "section",
    { class: `group ${group.changed ? "" : "unchanged"}`, "data-group": index },
    groupHead(group, view, index),
  );
  if (view.open) section.append(groupBody(group, view, index));
  return section;
}

function groupHead(group, view, index) {
  const toggle = el(
    "button",
    { type: "button", class: "toggle", "aria-expanded": view.open, click: () => toggleGroup(index) },
    el("span", { class: "chevron", "aria-hidden": "true" }),
    el("b", { text: groupTitle(group) }),
    group.layers.length > 1 ? el("span", { class: "times", text: `×${group.layers.length} alike` }) : null,
    ...groupCounts(group),
  );
  return el(
    "div",
    { class: "group-head" },
    toggle,
    group.layers.length > 1 && view.open ? layerSelect(group, view, index) : null,
  );
}

function groupCounts(group) {
  if (!group.changed) return [el("span", { class: "counts", text: `unchanged, ${plural(group.rows.length, "line")}` })];
  const kinds = group.rows.map(rowKind);
  const count = (...wanted) => kinds.filter((kind) => wanted.includes(kind)).length;
  const told = [
    ["gone", "−", count("gone", "replaced")],
    ["new", "+", count("new", "replaced")],
    ["changed", "~", count("changed")],
  ].filter(([, , number]) => number);
  return [
    el(
      "span",
      { class: "counts" },
      ...told.map(([kind, mark, number]) =>
        el("span", { class: kind, title: `${number} ${kind}`, text: `${mark}${number}` }),
      ),
    ),
  ];
}

function layerSelect(group, view, index) {
  const select = el(
    "select",
    { "aria-label": "Show the names of another of the layers that look alike" },
    ...group.layers.map((layer, number) => el("option", { value: number, text: layerName(layer) })),
  );
  select.value = String(view.layer);
  select.addEventListener("change", () => {
    view.layer = Number(select.value);
    redrawGroup(index, "select");
  });
  return el("label", { class: "pick" }, "names of ", select);
}

function toggleGroup(index) {
  const view = state.graphs[state.stage][index];
  view.open = !view.open;
  redrawGroup(index, ".toggle");
}

function groupBody(group, view, index) {
  const plain = !group.changed;
  const grid = el("div", {
    class: plain ? "rows plain-rows" : "rows",
    role: "grid",
    "aria-readonly": "true",
    "aria-label": groupTitle(group),
  });
  for (const { from, to, folded } of stretches(group, view)) {
    if (folded) grid.append(foldRow(view, index, from, to));
    else for (let row = from; row < to; row += 1) grid.append(rowElement(group, view, row, plain));
  }
  return grid;
}

/** Rows to show and rows to fold: those further than CONTEXT from any change. */
function stretches(group, view) {
  const { rows } = group;
  if (!group.changed || view.all) return [{ from: 0, to: rows.length, folded: false }];
  const near = new Uint8Array(rows.length);
  rows.forEach((row, index) => {
    if (rowKind(row) !== "same") near.fill(1, Math.max(0, index - CONTEXT), index + CONTEXT + 1);
  });
  const found = [];
  for (let from = 0, to; from < rows.length; from = to) {
    to = from + 1;
    while (to < rows.length && near[to] === near[from]) to += 1;
    const folded = !near[from] && to - from >= SHORTEST_FOLD && !view.opened.has(from);
    found.push({ from, to, folded });
  }
  return found;
}

function foldRow(view, index, from, to) {
  const open = () => {
    view.opened.add(from);
    redrawGroup(index).querySelector(`.cell[data-row="${from}"]`).focus();
  };
  const button = el("button", {
    type: "button",
    class: "fold",
    "data-from": from,
    text: `… ${to - from} unchanged lines`,
    click: open,
  });
  return el("div", { role: "row" }, el("div", { role: "gridcell" }, button));
}

function rowElement(group, view, number, plain) {
  const row = group.rows[number];
  const kind = rowKind(row);
  const texts = row.map((one) => (one === NOTHING ? [] : words(group, view.layer, one)));
  const edits = kind === "changed" ? editedWords(...texts) : [new Set(), new Set()];
  const cell = (side) => lineCell(group, view.layer, number, side, kind, texts[side], edits[side]);
  return el("div", { class: "row", role: "row" }, ...(plain ? [cell(1)] : [cell(0), cell(1)]));
}

const MARKS = {
  same: [" ", " "],
  gone: ["−", " "],
  new: [" ", "+"],
  changed: ["~", "~"],
  replaced: ["−", "+"],
};

function lineCell(group, layer, row, side, kind, text, edited) {
  const number = group.rows[row][side];
  if (number === NOTHING) return el("div", { class: "cell none", role: "gridcell", "aria-label": "nothing" });
  const shade = kind === "replaced" ? ["gone", "new"][side] : kind;
  const { source } = line(group, layer, number);
  return el(
    "div",
    { class: `cell ${shade}`, role: "gridcell", tabindex: "-1", "data-row": row, "data-side": side },
    el("span", { class: "margin", text: marginNumber(source), title: source, "aria-hidden": "true" }),
    el("span", { class: "mark", text: MARKS[kind][side], "aria-hidden": kind === "same" ? "true" : null }),
    codeElement(text, edited),
  );
}

/** The words of a line; the shape at its end is kept in one piece when the line wraps. */
function codeElement(text, edited = new Set()) {
  const code = el("code");
  const shape = el("span", { class: "tail" });
  text.forEach((word, index) => (word.kind === "shape" ? shape : code).append(wordElement(word, edited.has(index))));
  if (shape.childNodes.length) code.append("  ", shape);
  return code;
}

function wordElement({ kind, text, name }, edited) {
  if (kind === "plain" && !edited) return document.createTextNode(text);
  return el("span", { class: edited && text.trim() ? `${kind} edited` : kind, "data-name": name, text });
}
