// What is selected and open.

const state = {
  stage: 0,
  graphs: stages.map((stage) =>
    stage.groups.map((group) => ({
      open: group.changed || stage.groups.every((other) => !other.changed && stage.kind === "capture"),
      layer: 0,
      opened: new Set(), // first rows of the folds that were opened
    })),
  ),
  cell: null, // the line in the card
  hiddenParts: new Set(),
};

const stageBefore = (index) => (stages[index].before === index ? null : stages[stages[index].before]);

function selectStage(index, { focus = false } = {}) {
  const wasBelow = byId("graph").getBoundingClientRect().top < 60;
  state.stage = index;
  drawRail(focus);
  drawCharts();
  drawPanel();
  drawGraph();
  showCard(null);
  remember(`stage=${encodeURIComponent(stages[index].name)}`);
  if (wasBelow) byId("graph").scrollIntoView();
}

/** Keep the stage in the address, so that a reload or a link comes back to it. */
function remember(hash) {
  try {
    history.replaceState(null, "", `#${hash}`);
  } catch {
    // Some viewers of local files do not allow it; nothing depends on it.
  }
}

function firstStage() {
  const asked = /^#stage=(.+)$/.exec(location.hash);
  const named = asked ? stages.findIndex((stage) => encodeURIComponent(stage.name) === asked[1]) : -1;
  if (named >= 0) return named;
  const troubled = stages.findIndex((stage) => stage.state === "dropped" || stage.state === "incomplete");
  const first = stages.findIndex((stage) => stage.state === "complete");
  return Math.max(troubled >= 0 ? troubled : first, 0);
}
