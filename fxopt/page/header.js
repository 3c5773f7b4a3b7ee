// The model, what was asked for, and the checks.

const share = (check) =>
  typeof check.error === "number" && check.allowed > 0 ? check.error / check.allowed : Infinity;
const held = (check) => share(check) <= 1;

function drawHeader() {
  byId("model").textContent = report.model;
  const setting = { backend: report.backend, max_len: report.max_len, batch: report.batch };
  byId("setting").append(
    ...Object.entries(setting).map(([name, value]) =>
      el("li", {}, el("span", { text: `${name} ` }), el("b", { text: value })),
    ),
  );
  byId("run")
    .querySelector("summary")
    .append(...runFacts().map((fact) => el("span", { class: "fact" }, ...fact)));
  byId("run").querySelector(".run-body").append(checksTable(), proofsTable(), secondsTable());
}

function runFacts() {
  const facts = [];
  if (report.checks.length) {
    const worst = Math.max(...report.checks.map(share));
    const told = Number.isFinite(worst) ? `, error ${Math.round(100 * worst)} % of allowed` : "";
    const good = worst <= 1;
    facts.push([
      sign(good ? "verified" : "refuted"),
      good
        ? `Agrees with the stock model: ${plural(report.checks.length, "check")}${told}`
        : "Differs from the stock model",
    ]);
  } else facts.push([sign("idle"), "Not compared with the stock model"]);
  const proofs = report.proofs;
  if (proofs.length) {
    const copies = sum(proofs.map((proof) => proof.copies.length));
    facts.push([
      sign(copies ? "dropped" : "complete"),
      copies ? plural(copies, "cache-sized copy", "cache-sized copies") : "Caches written in place",
    ]);
  }
  if (report.launches.length)
    facts.push([`Compiled kernels: ${report.launches.map(([name, number]) => `${name} ${number}`).join(", ")}`]);
  if (report.graphs.length)
    facts.push([`Graphs ${report.graphs.map(([batch, ready]) => `for ${batch}: ${ready}`).join("; ")}`]);
  if (report.packed_bytes) facts.push([`${size(report.packed_bytes)} of weights packed`]);
  if (report.code_bytes) facts.push([`${size(report.code_bytes)} of codes for ${size(report.coded_bytes)} of weights`]);
  if (report.seconds.length) facts.push([`${sum(report.seconds.map(([, value]) => value)).toFixed(1)} s in all`]);
  return facts;
}

function table(caption, heads, rows) {
  if (!rows.length) return null;
  const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col", text })));
  return el(
    "table",
    {},
    el("caption", { text: caption }),
    el("thead", {}, head),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((cell) => el("td", {}, cell))))),
  );
}

function checksTable() {
  const rows = report.checks.map((check) => [
    check.note ? `${check.what}, ${check.note}` : check.what,
    el("span", { class: "measured" }, meter(check), `${tiny(check.error)} of ${tiny(check.allowed)}`),
    check.where,
    seconds(check.seconds),
  ]);
  return (
    table("Checks against the stock model", ["what", "error of allowed", "nearest to its limit", "took"], rows) ?? ""
  );
}

function proofsTable() {
  const launches = new Map(report.launches);
  const names = new Set([...report.proofs.map((proof) => proof.name), ...launches.keys()]);
  const rows = [...names].map((name) => {
    const proof = report.proofs.find((one) => one.name === name);
    const verdict = proof
      ? proof.copies.length
        ? `copies a cache: ${proof.copies.join("; ")}`
        : "no cache-sized copy"
      : "";
    return [name, String(launches.get(name) ?? ""), proof ? String(proof.writes) : "", verdict];
  });
  return table("Compiled code", ["graph", "kernels", "cache writes", "in place"], rows) ?? "";
}

function secondsTable() {
  const longest = Math.max(...report.seconds.map(([, value]) => value));
  const rows = report.seconds.map(([name, value]) => [
    name,
    el("span", { class: "measured" }, bar(value / longest), seconds(value)),
  ]);
  return table("Where the time went", ["step", "seconds"], rows) ?? "";
}

function bar(part) {
  const fill = el("span");
  fill.style.width = `${100 * clamp(part, 0, 1)}%`;
  return el("span", { class: "meter", "aria-hidden": "true" }, fill);
}

function meter(check) {
  const found = bar(share(check));
  found.classList.toggle("over", !held(check));
  return found;
}
