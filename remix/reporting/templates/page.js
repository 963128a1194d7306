"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const views = new Map();

/** Each chart against `axis`, in place of what was there. */
async function draw(axis) {
  for (const view of views.values()) view.finalize();
  await Promise.all(charts.map(async (chart) => {
    const specification = { ...chart.against[axis], datasets: { rows: chart.rows } };
    // The page's own colours and tooltips; what the menu would save has no meaning outside of the page.
    const options = { actions: false, renderer: "svg", tooltip: { disableDefaultStyle: true } };
    views.set(chart.name, await vegaEmbed(document.getElementById(`chart-${chart.name}`), specification, options));
  }));
  document.documentElement.dataset.drawn = axis;
}

for (const input of document.querySelectorAll("input[name=axis]")) {
  input.addEventListener("change", () => draw(input.value));
}
draw(document.querySelector("input[name=axis]:checked")?.value ?? "steps");
