// Bars: what one decode step costs after each stage.

const PARTS = [
  { key: "weights", title: "weights", of: (step) => step.weight_bytes },
  { key: "kv", title: "KV cache", of: (step) => step.kv_read_bytes + step.kv_written_bytes },
  { key: "copied", title: "copied", of: (step) => step.copied_bytes },
  { key: "rest", title: "the rest", of: (step) => rest(step) },
];

function rest(step) {
  return Math.max(
    0,
    step.moved_bytes - step.weight_bytes - step.kv_read_bytes - step.kv_written_bytes - step.copied_bytes,
  );
}

const shownParts = () => PARTS.filter(({ key }) => !state.hiddenParts.has(key));

/** Where the weights are nearly all that moves, bars that hold them would all look the same. */
function hideWhatDrownsTheRest() {
  const steps = stages.map((stage) => stage.step).filter(Boolean);
  const drowns =
    steps.length > 0 && steps.every((step) => step.weight_bytes > 0.8 * sum(PARTS.map(({ of }) => of(step))));
  if (drowns) state.hiddenParts.add("weights");
}

function drawCharts() {
  const charts = byId("charts");
  const had = charts.contains(document.activeElement) ? document.activeElement.closest("figure")?.dataset.chart : null;
  if (!stages.some((stage) => stage.step)) {
    charts.hidden = true;
    return;
  }
  charts.replaceChildren(launchChart(), movedChart());
  if (had) charts.querySelector(`[data-chart="${had}"] .column[tabindex="0"]`)?.focus();
}

function launchChart() {
  const of = ({ step }) => [{ key: "launches", value: step.launches }];
  const step = `one decode step, batch ${report.batch}, ${plural(report.context, "row")} of the cache filled`;
  return chart("launches", "Kernels launched", el("small", { text: step }), of, amount);
}

function movedChart() {
  const parts = shownParts();
  const legend = el(
    "span",
    { class: "legend", role: "group", "aria-label": "Parts shown" },
    ...PARTS.map(({ key, title }) =>
      el("button", {
        type: "button",
        class: key,
        "aria-pressed": !state.hiddenParts.has(key),
        title: `show or hide ${title}`,
        text: title,
        click: () => togglePart(key),
      }),
    ),
  );
  const of = ({ step }) => parts.map(({ key, of: value }) => ({ key, value: value(step) }));
  const most = Math.max(
    ...stages.filter((stage) => stage.step).map((stage) => sum(of(stage).map(({ value }) => value))),
  );
  const short = inUnitOf(most);
  const hidden = PARTS.filter(({ key }) => state.hiddenParts.has(key)).map((part) => part.title);
  const title = `${short.unit} moved${hidden.length ? ` without ${hidden.join(", ")}` : ""}`;
  return chart("moved", title, legend, of, short);
}

/** One unit for a whole chart, so that its numbers compare at a glance. */
function inUnitOf(most) {
  const power = clamp(Math.floor(Math.log(Math.max(most, 1)) / Math.log(1024)), 0, 4);
  const unit = ["B", "KiB", "MiB", "GiB", "TiB"][power];
  const short = (bytes) => {
    const number = bytes / 1024 ** power;
    return number.toFixed(power === 0 || number >= 99.5 ? 0 : number >= 9.95 || number === 0 ? 1 : 2);
  };
  return Object.assign(short, { unit });
}

function togglePart(key) {
  if (state.hiddenParts.has(key)) state.hiddenParts.delete(key);
  else if (shownParts().length > 1) state.hiddenParts.add(key);
  drawCharts();
  byId("charts").querySelector(`.legend .${key}`).focus();
}

function chart(name, title, legend, of, show) {
  const total = (stage) => sum(of(stage).map(({ value }) => value));
  const known = stages.filter((stage) => stage.step && stage.state !== "dropped");
  const [first, last] = [known[0], known.at(-1)].map((stage) => (stage ? total(stage) : 0));
  const most = Math.max(1, ...stages.filter((stage) => stage.step).map(total));
  const columns = el(
    "div",
    { class: "columns", role: "group", "aria-label": `${title} after each stage` },
    ...stages.map((stage, index) => column(stage, index, of, most, show, title)),
  );
  columns.addEventListener("keydown", (event) =>
    stepWith(event, ["ArrowLeft", "ArrowRight"], (step) => moveStage(step)),
  );
  const change = el(
    "span",
    { class: "change" },
    `${show(first)} → `,
    el("b", { text: show(last) }),
    ` ${percent(first, last)}`,
  );
  return el(
    "figure",
    { class: "chart", "data-chart": name },
    el("figcaption", {}, el("b", { text: title }), change, legend),
    columns,
  );
}

function column(stage, index, of, most, show, title) {
  const parts = stage.step ? of(stage) : [];
  const total = sum(parts.map(({ value }) => value));
  const told =
    parts.length > 1
      ? ` (${parts.map(({ key, value }) => `${PARTS.find((part) => part.key === key).title} ${show(value)}`).join(", ")})`
      : "";
  const label = `${stage.name}: ${stage.step ? `${title.toLowerCase()} ${show(total)}${told}` : "not known"}`;
  const selected = index === state.stage;
  const track = el("span", { class: "track" });
  for (const { key, value } of parts) {
    const segment = el("span", { class: `segment ${key}` });
    segment.style.height = `${(95 * value) / most}%`;
    if (value) track.append(segment);
  }
  return el(
    "button",
    {
      type: "button",
      class: `column ${stage.state}`,
      "aria-label": label,
      title: label,
      "aria-pressed": selected,
      tabindex: selected ? 0 : -1,
      click: () => selectStage(index),
    },
    el("span", { class: "number", text: stage.step ? show(total) : "" }),
    track,
    el("span", { class: "index", text: index + 1 }),
  );
}
