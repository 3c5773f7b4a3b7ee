// Finding nodes, ops and source lines, in this stage and in the others.

const SHOWN_HERE = 60;
const SHOWN_ELSEWHERE = 4;

/** Every line of a stage as text to look through: once if both sides agree. */
const haystack = (() => {
  const known = new Map();
  return (stage) => {
    if (!known.has(stage))
      known.set(
        stage,
        stages[stage].groups.flatMap((group, index) => groupHay(group, index)),
      );
    return known.get(stage);
  };
})();

function groupHay(group, groupNumber) {
  return group.rows.flatMap((row, rowNumber) => {
    const kind = rowKind(row);
    const sides = kind === "same" ? [1] : [0, 1].filter((side) => row[side] !== NOTHING);
    return sides.map((side) => ({
      place: { group: groupNumber, row: rowNumber, side },
      mark: MARKS[kind][side],
      texts: group.names.map((_, layer) =>
        `${lineText(group, layer, row[side])} ${strings[lines[row[side]][2]]}`.toLowerCase(),
      ),
    }));
  });
}

/** Lines with every word of the query, layers that look alike as one hit; exact names come first, then changes. */
function find(stage, query) {
  const wanted = query.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = [];
  for (const { place, mark, texts } of haystack(stage)) {
    const layers = texts.flatMap((text, layer) => (wanted.every((word) => text.includes(word)) ? [layer] : []));
    if (!layers.length) continue;
    const name = texts[layers[0]].split(" ", 1)[0];
    const rank = name === wanted[0] ? 0 : name.startsWith(wanted[0]) ? 1 : 2;
    hits.push({ stage, mark, layers, rank, ...place, layer: layers[0] });
  }
  return hits.sort((a, b) => a.rank - b.rank || (a.mark === " ") - (b.mark === " "));
}

function drawHits() {
  const query = byId("search").value.trim();
  const box = byId("hits");
  box.replaceChildren();
  setActiveHit(-1);
  box.hidden = !query;
  byId("search").setAttribute("aria-expanded", Boolean(query));
  if (!query) return;
  const here = hitGroup(state.stage, query, SHOWN_HERE, `in ${stages[state.stage].name}`);
  const others = stages.flatMap((_, index) =>
    index === state.stage ? [] : hitGroup(index, query, SHOWN_ELSEWHERE, stages[index].name),
  );
  box.append(
    ...(here.length ? here : [el("div", { class: "hits-head", text: `nothing in ${stages[state.stage].name}` })]),
  );
  if (others.length) box.append(el("div", { class: "hits-head apart", text: "in other stages" }), ...others);
  setActiveHit(0);
}

function hitGroup(stage, query, most, title) {
  const hits = find(stage, query);
  if (!hits.length) return [];
  const lineCount = sum(hits.map((hit) => hit.layers.length));
  const head = el("div", { class: "hits-head" }, el("b", { text: title }), ` ${plural(lineCount, "line")}`);
  const shown = hits.slice(0, most).map((hit) => hitOption(hit, query));
  const more =
    hits.length > most
      ? [el("div", { class: "hits-more", text: `and ${plural(hits.length - most, "place")} more` })]
      : [];
  return [head, ...shown, ...more];
}

let hitNumber = 0;

function hitOption(hit, query) {
  const group = stages[hit.stage].groups[hit.group];
  const number = group.rows[hit.row][hit.side];
  const alike = hit.layers.length > 1 ? ` ×${hit.layers.length}` : "";
  hitNumber += 1;
  return el(
    "div",
    {
      class: "hit",
      role: "option",
      id: `hit-${hitNumber}`,
      "aria-selected": "false",
      click: () => takeHit(hit),
    },
    el("span", { class: `mark ${hit.mark === "−" ? "gone" : hit.mark === "+" ? "new" : ""}`, text: hit.mark }),
    el("code", {}, ...markedText(lineText(group, hit.layer, number), query)),
    el("span", {
      class: "where",
      text:
        hit.layers.length > 1
          ? `layers ${ranges(hit.layers.map((one) => group.layers[one]))}${alike}`
          : layerName(group.layers[hit.layer]),
    }),
    el("span", { class: "source", text: strings[lines[number][2]] }),
  );
}

function markedText(text, query) {
  const wanted = query.split(/\s+/).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return text
    .split(new RegExp(`(${wanted.join("|")})`, "i"))
    .map((part, index) => (index % 2 ? el("mark", { text: part }) : part));
}

function takeHit(hit) {
  hideHits();
  goTo(hit);
}

function hideHits() {
  byId("hits").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
}

const hitOptions = () => [...byId("hits").querySelectorAll(".hit")];

function setActiveHit(index) {
  const all = hitOptions();
  all.forEach((hit, number) => hit.setAttribute("aria-selected", number === index));
  const active = all[index];
  if (active) {
    byId("search").setAttribute("aria-activedescendant", active.id);
    active.scrollIntoView({ block: "nearest" });
  } else byId("search").removeAttribute("aria-activedescendant");
}

function onSearchKey(event) {
  const all = hitOptions();
  const active = all.findIndex((hit) => hit.getAttribute("aria-selected") === "true");
  if (event.key === "Enter") all[Math.max(active, 0)]?.click();
  else if (event.key === "ArrowDown") setActiveHit(clamp(active + 1, 0, all.length - 1));
  else if (event.key === "ArrowUp") setActiveHit(clamp(active - 1, 0, all.length - 1));
  else if (event.key === "Escape") clearSearch();
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function clearSearch() {
  byId("search").value = "";
  drawHits();
  byId("search").blur();
}
