// Draw each chart of the page from its JSON, in the colours and the width of a screen or of paper.
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const onPaper = matchMedia("print");
const darkColours = new Map(Object.values(PALETTE));

function draw(paper) {
  for (const plot of document.querySelectorAll(".plot")) {
    const json = plot.parentElement.querySelector("script").textContent;
    const dark = prefersDark.matches && !paper;
    const figure = JSON.parse(json.replace(/#[0-9a-f]{6}/g, (c) => (dark && darkColours.get(c)) || c));
    const layout = { ...figure.layout, width: plot.clientWidth, height: plot.clientHeight };
    Plotly.react(plot, figure.data, layout, { displayModeBar: false });
  }
}

// Paper has no scroll bars and no folds, and a width of its own, which page.css gives the class.
function prepare(paper) {
  document.documentElement.classList.toggle("paper", paper);
  for (const fold of document.querySelectorAll("details")) fold.open = paper;
  draw(paper);
}

prefersDark.addEventListener("change", () => draw(onPaper.matches));
addEventListener("beforeprint", () => prepare(true));
addEventListener("afterprint", () => prepare(false));
let shownWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== shownWidth) draw(onPaper.matches);
  shownWidth = innerWidth;
});
draw(onPaper.matches);
