// Reading values off: the point nearest to the pointer, or to a finger, in each chart.
for (const plot of document.querySelectorAll("svg.plot[data-xs]")) {
  const xs = plot.dataset.xs.split(" ").map(Number);
  const at = plot.dataset.at.split("|");
  const values = [...plot.querySelectorAll("path[data-values]")].map((p) => p.dataset.values.split("|"));
  const card = plot.closest("figure");
  const shown = [...card.querySelectorAll(".legend .value")];
  const where = card.querySelector(".legend .where");
  const hair = plot.querySelector(".hair");
  const usual = shown.map((b) => b.textContent);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 360;
    const i = xs.reduce((best, v, j) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? j : best), 0);
    shown.forEach((b, j) => (b.textContent = values[j][i]));
    where.textContent = `${plot.dataset.name} ${at[i]}`;
    hair.setAttribute("transform", `translate(${xs[i]})`);
    plot.classList.add("read");
  });
  plot.addEventListener("pointerleave", () => {
    shown.forEach((b, j) => (b.textContent = usual[j]));
    where.textContent = "";
    plot.classList.remove("read");
  });
}
// Browsers that cannot open folds by style: open them for the print.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
