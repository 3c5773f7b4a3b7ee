// The pipeline at the left, every stage in order.

const railHeading = { capture: "Symbolic graph", specialise: "One-token graph", code: "Compiled code" };

function drawRail(focus) {
  const rail = byId("stages");
  const chosen = () => rail.querySelector('[aria-selected="true"]');
  if (!rail.childElementCount) {
    stages.forEach((stage, index) => {
      if (railHeading[stage.kind] && stage.kind !== stages[index - 1]?.kind)
        rail.append(el("div", { class: "rail-head", role: "presentation", text: railHeading[stage.kind] }));
      rail.append(railItem(stage, index));
    });
    rail.addEventListener("keydown", (event) =>
      stepWith(event, ["ArrowUp", "ArrowDown"], (step) => moveStage(step, true)),
    );
  }
  for (const item of rail.querySelectorAll("[role=option]")) {
    const selected = Number(item.dataset.stage) === state.stage;
    item.setAttribute("aria-selected", selected);
    item.tabIndex = selected ? 0 : -1;
  }
  if (focus) chosen().focus();
  chosen().scrollIntoView?.({ block: "nearest" });
}

function railItem(stage, index) {
  const label = `${index + 1}, ${stage.name}: ${STATES[stage.state]}${matchedLabel(stage)}${verifiedLabel(stage)}`;
  const check = stage.verified;
  const item = el(
    "div",
    {
      class: `stage ${stage.state}`,
      role: "option",
      "aria-label": label,
      "data-stage": index,
      click: () => selectStage(index, { focus: true }),
    },
    el("span", { class: "index", text: index + 1 }),
    sign(stage.state, STATES[stage.state]),
    el("span", { class: "name", text: stage.name }),
    el("span", { class: "count", text: matchedText(stage) }),
    check ? sign(held(check) ? "verified" : "refuted", verifiedLabel(stage).slice(2)) : el("span"),
    el("span", { class: "note", text: railNote(stage) }),
  );
  return item;
}

function matchedText(stage) {
  if (stage.state === "start") return "";
  if (stage.state === "dropped") return "dropped";
  if (stage.state === "idle") return "–";
  return stage.expected === null ? amount(stage.matched) : `${amount(stage.matched)}/${amount(stage.expected)}`;
}

const matchedLabel = (stage) =>
  stage.state === "start" ? "" : `, matched ${stage.matched}${stage.expected === null ? "" : ` of ${stage.expected}`}`;
const verifiedLabel = ({ verified }) =>
  verified
    ? `, ${held(verified) ? "verified" : "not the stock result"}: error ${tiny(verified.error)} of ${tiny(verified.allowed)} allowed`
    : "";

const codeNote = (stage) => (stage.groups.some((group) => group.changed) ? "between the pieces" : "no graph changes");

function railNote(stage) {
  if (stage.kind === "code") return stage.state === "dropped" ? "" : codeNote(stage);
  if (stage.state === "start") return plural(stage.nodes[1], "node");
  const left = stage.refused.length + (stage.state === "complete" ? 0 : stage.near.length);
  const change = stage.nodes[1] - stage.nodes[0];
  const nodes = change ? `${signed(change, amount)} nodes` : "no node changed";
  return left ? `${nodes} · ${amount(left)} left alone` : nodes;
}

function moveStage(step, focus = false) {
  selectStage(clamp(state.stage + step, 0, stages.length - 1), { focus });
}

/** Call `move` with -1 or 1 for two keys, and with far steps for Home and End. */
function stepWith(event, [back, forth], move) {
  const steps = { [back]: -1, [forth]: 1, Home: -1e6, End: 1e6 };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  event.stopPropagation();
  move(steps[event.key]);
}
