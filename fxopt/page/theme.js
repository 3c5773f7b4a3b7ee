// Light or dark: as the system is, until somebody switches.

const THEME = "fxopt-theme";
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function storedTheme() {
  try {
    const theme = localStorage.getItem(THEME);
    return theme === "light" || theme === "dark" ? theme : null;
  } catch {
    return null;
  }
}

const shownTheme = () => document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light");

function nameTheme() {
  const label = `Switch to ${shownTheme() === "dark" ? "light" : "dark"} (t)`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

function switchTheme() {
  const theme = shownTheme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  nameTheme();
  try {
    localStorage.setItem(THEME, theme);
  } catch {
    // Not kept where storage is off; the switch itself works.
  }
}
