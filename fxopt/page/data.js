// Everything in `data` comes from a model that nobody vouches for: it is shown through textContent
// and plain attributes, and never becomes markup, a URL or a style.

const data = JSON.parse(document.getElementById("data").textContent);
const { report, stages, lines, strings } = data;

const NAME = "\x1f"; // stands for a name in the template of a line
const NOTHING = -1; // no line on this side of a row
const CONTEXT = 3; // unchanged lines shown around a change
const SHORTEST_FOLD = 4;

const STATES = {
  start: "where the next passes start",
  complete: "complete",
  incomplete: "incomplete",
  dropped: "dropped",
  idle: "nothing to do",
};
