// Lines of a graph: their words, what an edit changed in them, and where their names are used.

/** What a line is made of; names are those of one of the layers that look alike. */
function line(group, layer, number) {
  const [template, value, source, madeBy, slots] = lines[number];
  const names = group.names[layer];
  return {
    template: strings[template],
    value: strings[value],
    source: strings[source],
    madeBy: madeBy.map((name) => strings[name]),
    names: slots.map((slot) => names[slot]),
  };
}

function lineText(group, layer, number) {
  const { template, names } = line(group, layer, number);
  const [first, ...others] = template.split(NAME);
  return first + others.map((part, index) => strings[names[index]] + part).join("");
}

function sameText(one, other) {
  if (one === NOTHING || other === NOTHING) return false;
  const [left, right] = [lines[one], lines[other]];
  return (
    left[0] === right[0] &&
    left[4].length === right[4].length &&
    left[4].every((slot, index) => slot === right[4][index])
  );
}

/** same, gone, new; changed (one name on both sides) or replaced (two lines that only face each other). */
function rowKind([before, after]) {
  if (after === NOTHING) return "gone";
  if (before === NOTHING) return "new";
  if (sameText(before, after)) return "same";
  return lines[before][4][0] === lines[after][4][0] ? "changed" : "replaced";
}

/** A line as words: the name it defines, the operator, names it reads, shapes, and what is between. */
function words(group, layer, number) {
  const { template, names } = line(group, layer, number);
  const found = [];
  template.split(NAME).forEach((part, index, parts) => {
    if (index > 0) {
      const name = names[index - 1];
      const kind = index === 1 ? "def" : strings[name].includes(".") ? "weight" : "ref";
      found.push({ kind, text: strings[name], name });
    }
    found.push(...plainWords(part, index === 1, index === parts.length - 1));
  });
  return found;
}

function plainWords(part, hasOperator, isLast) {
  const operator = hasOperator ? /^ = ([^(]+)(?=\()/.exec(part) : null;
  const tail = operator ? part.slice(operator[0].length) : part;
  const comment = isLast ? tail.lastIndexOf("  # ") : -1;
  const code = comment < 0 ? tail : tail.slice(0, comment);
  const split = (text, kind) => (text.match(/[\w.]+|\s+|[^\w\s]/g) ?? []).map((word) => ({ kind, text: word }));
  return [
    ...(operator
      ? [
          { kind: "plain", text: " = " },
          { kind: "op", text: operator[1] },
        ]
      : []),
    ...split(code, "plain"),
    ...(comment < 0 ? [] : split(tail.slice(comment).trim(), "shape")),
  ];
}

/** Which words of two lines the other one lacks: their longest common run of words is left out. */
function editedWords(left, right) {
  const lengths = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1));
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      lengths[i][j] =
        left[i].text === right[j].text ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const edited = [new Set(left.keys()), new Set(right.keys())];
  for (let i = 0, j = 0; i < left.length && j < right.length;) {
    if (left[i].text === right[j].text) {
      edited[0].delete(i++);
      edited[1].delete(j++);
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i += 1;
    else j += 1;
  }
  return edited;
}

/** Where every name of a stage is defined and used, on one side; worked out when first asked for. */
const usage = (() => {
  const known = new Map();
  return (stage, side) => {
    const key = `${stage} ${side}`;
    if (!known.has(key)) known.set(key, indexed(stages[stage].groups, side));
    return known.get(key);
  };
})();

function indexed(groups, side) {
  const index = new Map();
  const entry = (name) => index.get(name) ?? index.set(name, { place: null, uses: [] }).get(name);
  groups.forEach((group, groupNumber) =>
    group.rows.forEach((row, rowNumber) => {
      if (row[side] === NOTHING) return;
      const slots = lines[row[side]][4];
      group.names.forEach((names, layer) => {
        const place = { group: groupNumber, row: rowNumber, layer, side };
        entry(names[slots[0]]).place = place;
        for (const slot of new Set(slots.slice(1))) entry(names[slot]).uses.push(place);
      });
    }),
  );
  return index;
}

const placeName = (stage, { group, row, layer, side }) => {
  const { names, rows } = stages[stage].groups[group];
  return names[layer][lines[rows[row][side]][4][0]];
};
