// From line to line and from change to change.

const cells = () => [...byId("graph").querySelectorAll(".cell:not(.none)")];

function focusCell(cell) {
  for (const other of byId("graph").querySelectorAll('.cell[tabindex="0"]')) other.tabIndex = -1;
  cell.tabIndex = 0;
  cell.focus({ preventScroll: true });
  intoView(cell);
}

/** Scroll only as far as needed to be clear of the headings above and the card below. */
function intoView(cell) {
  const { top, bottom } = cell.getBoundingClientRect();
  const roof = 150;
  const floor = byId("card").getBoundingClientRect().top - 12;
  if (top < roof) scrollBy(0, top - roof);
  else if (bottom > floor) scrollBy(0, bottom - floor);
}

function onGraphKey(event) {
  const cell = event.target.closest?.(".cell");
  if (!cell || event.ctrlKey || event.metaKey || event.altKey) return;
  const side = Number(cell.dataset.side);
  if (event.key === "Enter") {
    event.preventDefault();
    byId("card").querySelector("button")?.focus();
  } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    const other = [...cell.parentElement.children].find((one) => one !== cell && !one.classList.contains("none"));
    if (other && Number(other.dataset.side) === (event.key === "ArrowRight" ? 1 : 0)) focusCell(other);
  } else stepWith(event, ["ArrowUp", "ArrowDown"], (step) => moveLine(cell, side, step));
}

/** The next line on this side; a line of another kind of row stands in where this side has none. */
function moveLine(cell, side, step) {
  const all = cells();
  const sameSide = all.filter((one) => Number(one.dataset.side) === side || one.parentElement.childElementCount === 1);
  const next = sameSide[clamp(sameSide.indexOf(cell) + step, 0, sameSide.length - 1)];
  if (next) focusCell(next);
}

/** The first line of every stretch of changed rows. */
function changeStarts() {
  const rows = [...byId("graph").querySelectorAll(".row")];
  const isChanged = (row) => Boolean(row?.querySelector(".gone, .new, .changed"));
  return rows
    .filter((row) => isChanged(row) && !isChanged(row.previousElementSibling))
    .map((row) => row.querySelector(".cell:not(.none)"));
}

/** To the next or previous change from the line that has the focus, round at the ends. */
function moveChange(by) {
  const all = changeStarts();
  const current = document.activeElement.closest(".cell") ?? state.cell;
  const precedes = (one, other) => Boolean(one.compareDocumentPosition(other) & Node.DOCUMENT_POSITION_FOLLOWING);
  const ahead = by > 0 ? (cell) => precedes(current, cell) : (cell) => precedes(cell, current);
  const reachable = current?.isConnected ? all.filter(ahead) : all;
  const next = reachable.at(by > 0 ? 0 : -1) ?? all.at(by > 0 ? 0 : -1);
  if (next) focusCell(next);
}

/** Show one line of one layer of one stage, with everything opened that hides it. */
function goTo({ stage, group, row, layer, side }) {
  if (stage !== state.stage) selectStage(stage);
  const { changed, rows } = stages[stage].groups[group];
  const view = state.graphs[stage][group];
  view.open = true;
  view.layer = layer;
  const fold = stretches(stages[stage].groups[group], view).find(
    ({ from, to, folded }) => folded && from <= row && row < to,
  );
  if (fold) view.opened.add(fold.from);
  const shown = !changed || rows[row][side] === NOTHING ? 1 : side;
  const cell = redrawGroup(group).querySelector(`.cell[data-row="${row}"][data-side="${shown}"]`);
  focusCell(cell);
  cell.scrollIntoView({ block: "center" });
  cell.classList.add("found");
  cell.addEventListener("animationend", () => cell.classList.remove("found"), { once: true });
}
