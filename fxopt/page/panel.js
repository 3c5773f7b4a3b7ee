// What the selected stage did, in numbers and places.

function drawPanel() {
  const stage = stages[state.stage];
  byId("panel").replaceChildren(
    ...[
      panelTitle(stage),
      stage.dropped === null ? null : el("p", { class: "banner" }, sign("dropped"), `Dropped: ${stage.dropped}`),
      el("dl", { class: "tiles" }, ...passTiles(stage)),
      stage.step
        ? el("dl", { class: "tiles step", "aria-label": "One decode step after this stage" }, ...stepTiles(stage))
        : null,
      opChips(stage),
      places("Refused", stage.refused, stage.refused.length <= 400),
      places("Nearly matched", stage.near, stage.state !== "complete"),
      places("Rewritten places", stage.sites, false),
    ].filter(Boolean),
  );
}

function panelTitle(stage) {
  return el(
    "div",
    { class: "panel-title" },
    el("span", { class: "index", text: state.stage + 1 }),
    el("h2", { id: "stage-title", text: stage.name }),
    el("span", { class: `badge ${stage.state}` }, sign(stage.state), STATES[stage.state]),
    el("p", { class: "summary", text: stage.summary }),
  );
}

function tile(title, value, note = "", kind = "") {
  const shown = value instanceof Node ? value : document.createTextNode(value);
  return el(
    "div",
    { class: `tile ${kind}` },
    el("dt", { text: title }),
    el("dd", {}, shown, note instanceof Node ? note : el("small", { text: note })),
  );
}

function passTiles(stage) {
  if (stage.kind === "code") return codeTiles(stage);
  const [before, after] = stage.nodes;
  const nodes = el("span", {}, before === after ? "" : `${amount(before)} → `, amount(after));
  if (stage.state === "start") return [tile("Nodes", nodes), ...verifiedTile(stage)];
  const expected = stage.expected === null ? "no number expected" : `of ${amount(stage.expected)} expected`;
  return [
    tile("Matched", amount(stage.matched), expected, stage.state === "incomplete" ? "bad" : ""),
    tile("Refused", amount(stage.refused.length)),
    tile("Near misses", amount(stage.near.length)),
    tile("Nodes", nodes, before === after ? "no change" : signed(after - before, amount)),
    tile("Weights freed", stage.freed_bytes ? signed(-stage.freed_bytes, size) : "none"),
    tile("Took", seconds(stage.seconds)),
    ...verifiedTile(stage),
  ];
}

function codeTiles(stage) {
  const stream = report.streams.find(({ pass }) => pass === stage.name);
  return stream ? streamTiles(stage, stream) : arenaTiles(stage);
}

function streamTiles(stage, stream) {
  return [
    tile("Layers streamed", amount(stage.matched), `of ${amount(stream.layers)}`),
    tile("Slots", amount(stream.slots), `of ${size(stream.slot_bytes)}`),
    tile("On the device", size(stream.device_bytes), stream.what),
    tile("Read in a step", stream.moved === null ? "–" : size(stream.moved), `from ${stream.store}`),
  ];
}

/** The sizes of the one arena are those of the graph that needs most. */
function arenaTiles(stage) {
  const most = (key) => Math.max(0, ...report.arenas.map((graph) => graph[key]));
  const [arena, least] = [most("arena"), most("lower_bound")];
  return [
    tile("Pieces placed", amount(stage.matched), `of ${amount(stage.expected)}`, stage.state === "incomplete" ? "bad" : ""),
    tile("Arena", size(arena), "for all graphs"),
    tile("Least possible", size(least), least ? `the arena is ${(arena / least).toFixed(3)} of it` : ""),
    tile("Handed on", size(most("handed_on")), "from piece to piece, beside the arena"),
  ];
}

function verifiedTile({ verified: check, state: kind }) {
  if (!check)
    return kind === "start"
      ? []
      : [tile("Verified", "–", kind === "idle" ? "nothing to verify" : "not on its own", "wide")];
  const value = el("span", {}, `${tiny(check.error)} `, el("small", { text: `of ${tiny(check.allowed)} allowed` }));
  const where = el("span", { class: "where" }, meter(check), el("small", { text: check.where, title: check.where }));
  return [tile(held(check) ? "Verified" : "Not the stock result", value, where, held(check) ? "wide" : "wide bad")];
}

const STEP = [
  ["Kernels", "launches", amount],
  ["Weights", "weight_bytes", size],
  ["KV read", "kv_read_bytes", size],
  ["KV written", "kv_written_bytes", size],
  ["Copied", "copied_bytes", size],
  ["All moved", "moved_bytes", size],
  ["FLOPs", "flops", amount],
  ["Peak", "peak_bytes", size],
];

function stepTiles(stage) {
  const earlier = stageBefore(state.stage)?.step;
  return STEP.map(([title, key, show]) => {
    const [from, to] = [earlier?.[key], stage.step[key]];
    if (from === undefined || from === to) return tile(title, show(to), from === undefined ? "" : "as before");
    const relative = percent(from, to);
    const change = signed(to - from, show) + (relative ? ` (${relative})` : "");
    return tile(title, show(to), change, to < from ? "less" : "more");
  });
}

function opChips(stage) {
  if (!stage.ops.length) return null;
  const chip = ([op, change]) =>
    el("li", { class: change < 0 ? "gone" : "new" }, el("b", { text: signed(change, amount) }), ` ${op}`);
  return el("ul", { class: "ops", "aria-label": "Operators removed and added" }, ...stage.ops.map(chip));
}

/** Places with the same reason (but for numbers) and the same source told once; every node can be gone to. */
function places(title, spots, open) {
  if (!spots.length) return null;
  const alike = grouped(spots, ([, source, , reason]) => `${strings[source]} ${strings[reason].replace(/_?\d+/g, "")}`);
  const body = el("div", { class: "places" });
  const details = el(
    "details",
    { class: "spots" },
    el("summary", {}, `${title} `, el("b", { text: amount(spots.length) })),
    body,
  );
  const fill = () => body.childElementCount || body.append(...[...alike.values()].map(placeGroup));
  details.addEventListener("toggle", fill);
  if (open) fill();
  details.open = open;
  return details;
}

function placeGroup(spots) {
  const [, source, , reason] = spots[0];
  const layers = spots.map(([, , layer]) => layer).filter((layer) => layer !== null);
  const where = [
    layers.length ? `${new Set(layers).size > 1 ? "layers" : "layer"} ${ranges(layers)}` : "",
    layers.length < spots.length ? "outside the layers" : "",
  ];
  return el(
    "div",
    { class: "place" },
    el("span", { class: "where", text: where.filter(Boolean).join(", ") }),
    el("code", { text: strings[source] }),
    strings[reason] ? el("p", { text: strings[reason] }) : null,
    nodeList(spots.map(([node]) => node)),
  );
}

function nodeList(nodes) {
  const list = el("span", { class: "nodes" });
  const show = (shown) => {
    list.replaceChildren(...nodes.slice(0, shown).map((node) => nodeButton(node)));
    if (nodes.length > shown)
      list.append(
        el("button", {
          type: "button",
          class: "link more",
          text: `and ${nodes.length - shown} more`,
          click: () => show(nodes.length),
        }),
      );
  };
  show(nodes.length > 12 ? 8 : nodes.length);
  return list;
}

/** A node by name; a button if it is in the graph that is shown. */
function nodeButton(node) {
  const place = [0, 1].map((side) => usage(state.stage, side).get(node)?.place).find(Boolean);
  if (!place) return el("code", { text: strings[node] });
  return el("button", {
    type: "button",
    class: "link",
    text: strings[node],
    click: () => goTo({ stage: state.stage, ...place }),
  });
}
