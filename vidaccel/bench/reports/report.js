const UNITS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15 };

// What a cell is sorted by: its first number with the prefix of its unit, else its text; nothing comes last.
function key(cell) {
  const text = cell.textContent.trim();
  const found = text.match(/^([+-]?[\d.]+(?:e[+-]?\d+)?)(?: ([kMGTP])?(?:B|FLOPs)\b)?/);
  return found ? Number(found[1]) * (UNITS[found[2]] || 1) : text;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

for (const heading of document.querySelectorAll("th")) {
  heading.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [key(row.cells[heading.cellIndex]), row]);
    const full = rows.filter(([value]) => value !== "").sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
    body.append(...full.map(([, row]) => row), ...rows.filter(([value]) => value === "").map(([, row]) => row));
  });
}

const videos = [...document.querySelectorAll("video")];
function playAll() {
  for (const video of videos) {
    video.currentTime = 0;
    video.play();
  }
}
for (const video of videos) video.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
document.getElementById("together")?.addEventListener("click", playAll);
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) playAll();
