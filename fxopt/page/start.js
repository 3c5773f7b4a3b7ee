// Keys for the whole page, and the first drawing.

const KEYS = {
  j: () => moveStage(1),
  k: () => moveStage(-1),
  n: () => moveChange(1),
  p: () => moveChange(-1),
  t: switchTheme,
  "/": () => byId("search").focus(),
  "?": () => byId("help").showModal(),
  Escape: () =>
    byId("card").contains(document.activeElement) && state.cell?.isConnected
      ? focusCell(state.cell)
      : byId("search").value && clearSearch(),
};

function onKey(event) {
  const typing = event.target.closest?.("input, select, textarea, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function listen() {
  let waiting = 0;
  document.addEventListener("keydown", onKey);
  byId("graph").addEventListener("keydown", onGraphKey);
  byId("graph").addEventListener("focusin", (event) => showCardAt(event.target));
  byId("graph").addEventListener("pointermove", onPointer);
  byId("graph").addEventListener("click", (event) => {
    const cell = event.target.closest(".cell:not(.none)");
    if (cell && !String(getSelection())) focusCell(cell);
  });
  byId("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(drawHits, 60);
  });
  byId("search").addEventListener("focus", drawHits);
  byId("search").addEventListener("keydown", onSearchKey);
  byId("search").addEventListener("blur", hideHits);
  byId("hits").addEventListener("mousedown", (event) => event.preventDefault()); // keeps the focus in the search box
  byId("theme").addEventListener("click", switchTheme);
  byId("help-button").addEventListener("click", KEYS["?"]);
  byId("help-close").addEventListener("click", () => byId("help").close());
  prefersDark.addEventListener("change", nameTheme);
}

function start() {
  const theme = storedTheme();
  if (theme) document.documentElement.dataset.theme = theme;
  nameTheme();
  drawHeader();
  hideWhatDrownsTheRest();
  listen();
  if (stages.length) selectStage(firstStage());
}

start();
