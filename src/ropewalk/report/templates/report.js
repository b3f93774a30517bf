"use strict";
const plots = [...document.querySelectorAll(".plot")];

for (const div of plots) {
  const { data, layout } = JSON.parse(div.querySelector("script").textContent);
  delete layout.width;
  Plotly.newPlot(div, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}

// A legend button hides or shows its run in every panel of its figure.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const div of button.closest(".figure").querySelectorAll(".plot")) {
      const escaped = button.dataset.run.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
      const indices = div.data.flatMap((trace, i) => (trace.legendgroup === escaped ? [i] : []));
      if (indices.length) Plotly.restyle(div, { visible: shown }, indices);
    }
  });
}

// Paper is narrower than the screen, and plots have a width in pixels.
function fit() {
  for (const div of plots) Plotly.relayout(div, { width: div.clientWidth });
}
const folded = [...document.querySelectorAll("details:not([open])")];
window.addEventListener("beforeprint", () => {
  for (const details of folded) details.open = true;  // nobody can unfold paper
  document.body.classList.add("printing");
  fit();
});
window.addEventListener("afterprint", () => {
  document.body.classList.remove("printing");
  for (const details of folded) details.open = false;
  for (const div of plots) Plotly.relayout(div, { autosize: true, width: null });
});
