// What is known of one line, and the lines it is tied to.

function cellPlace(cell) {
  const group = Number(cell.closest(".group").dataset.group);
  return {
    group,
    row: Number(cell.dataset.row),
    layer: state.graphs[state.stage][group].layer,
    side: Number(cell.dataset.side),
  };
}

function showCardAt(target) {
  const cell = target.closest?.(".cell:not(.none)");
  if (cell) showCard(cell);
}

/** Only when the pointer itself moves: lines that scroll past below it say nothing. */
const onPointer = (() => {
  let last = "";
  return (event) => {
    const here = `${event.screenX} ${event.screenY}`;
    if (here !== last) showCardAt(event.target);
    last = here;
  };
})();

function showCard(cell) {
  if (cell && cell === state.cell) return;
  state.cell = cell;
  byId("card").replaceChildren(...(cell ? cardParts(cellPlace(cell)) : legendParts()));
  highlight(cell);
}

/** What colours and letters mean, as long as there is no line to tell about. */
function legendParts() {
  const key = (shade, mark, text) => el("span", { class: `key ${shade}` }, el("b", { text: mark }), ` ${text}`);
  const letters = {
    B: "batch",
    S: "tokens of the step",
    P: "tokens before it",
    N: "rows attended to",
    K: "logits asked for",
  };
  return [
    el("p", { text: "Point at a line, or go to it with the arrow keys, to see what it holds and where that is used." }),
    el(
      "p",
      { class: "keys-of-lines" },
      key("gone", "−", "gone"),
      key("new", "+", "new"),
      key("changed", "~", "changed"),
      el("span", {}, el("span", { class: "is-used", text: "name" }), " the line's value, wherever it is read"),
      el("span", {}, el("span", { class: "is-read", text: "name" }), " what the line reads, where it is made"),
    ),
    el(
      "p",
      { class: "keys-of-lines" },
      ...Object.entries(letters).map(([letter, text]) => el("span", {}, el("code", { text: letter }), ` ${text}`)),
    ),
  ];
}

function cardParts(place) {
  const group = stages[state.stage].groups[place.group];
  const number = group.rows[place.row][place.side];
  const { value, source, madeBy, names } = line(group, place.layer, number);
  const known = usage(state.stage, place.side);
  const uses = known.get(names[0]).uses;
  const text = words(group, place.layer, number);
  return [
    el(
      "div",
      { class: "card-line" },
      el("span", { class: "where", text: layerName(group.layers[place.layer]) }),
      codeElement(text),
    ),
    el(
      "dl",
      {},
      field("value", value ? el("b", { text: value }) : "none"),
      field("model code", el("code", { text: source === "?" ? "none: made by a pass or by tracing" : source })),
      field("made by", madeBy.length ? el("span", {}, ...madeBy.map(stageButton)) : "the capture"),
      field(
        "reads",
        refList(
          [...new Set(names.slice(1))].map((name) => ({ name, place: known.get(name)?.place })),
          place,
          "reads",
        ),
      ),
      field(
        "used by",
        uses.length
          ? refList(
              uses.map((use) => ({ name: placeName(state.stage, use), place: use })),
              place,
              "uses",
            )
          : "no line: an output, a write, or a size that is told as a letter",
      ),
    ),
  ];
}

const field = (title, value) => el("div", {}, el("dt", { text: title }), el("dd", {}, value));

function stageButton(name) {
  const index = stages.findIndex((stage) => stage.name === name);
  if (index < 0) return el("code", { text: name });
  return el("button", { type: "button", class: "link", text: name, click: () => selectStage(index, { focus: true }) });
}

function refList(refs, from, kind) {
  const list = el("span", { class: `refs ${kind}` });
  const shown = 6;
  const button = ({ name, place }) => {
    if (!place) return el("code", { text: strings[name] });
    const group = stages[state.stage].groups[place.group];
    const far =
      place.group !== from.group || place.layer !== from.layer ? ` (${layerName(group.layers[place.layer])})` : "";
    return el("button", {
      type: "button",
      class: "link",
      text: strings[name] + far,
      click: () => goTo({ stage: state.stage, ...place }),
    });
  };
  list.append(...refs.slice(0, shown).map(button));
  if (refs.length > shown) {
    list.append(
      el("button", {
        type: "button",
        class: "link more",
        text: `and ${refs.length - shown} more`,
        click: () => list.replaceChildren(...refs.map(button)),
      }),
    );
  }
  return list.childElementCount ? list : "nothing";
}

/** Mark the line's own name wherever it is read, and what the line reads where it is defined. */
function highlight(cell) {
  const graph = byId("graph");
  for (const marked of graph.querySelectorAll(".is-used, .is-read, .current"))
    marked.classList.remove("is-used", "is-read", "current");
  if (!cell) return;
  cell.classList.add("current");
  const names = [...cell.querySelectorAll("[data-name]")].map((word) => word.dataset.name);
  const mark = (name, selector, kind) => {
    for (const word of graph.querySelectorAll(`${selector}[data-name="${name}"]`)) word.classList.add(kind);
  };
  mark(names[0], "", "is-used");
  for (const name of names.slice(1)) mark(name, ".def", "is-read");
}
