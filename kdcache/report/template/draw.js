"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  const grey = { labelColor: "var(--muted)", titleColor: "var(--muted)", titleFontWeight: "normal" };
  const config = {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...grey, gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", labelOverlap: true },
    axisBand: { grid: false },
    axisX: { tickCount: 8 },
    text: { color: "var(--fg)", fontSize: 12 },
    rule: { color: "var(--muted)" },
    mark: { color: "var(--c1)" },
  };
  const options = { renderer: "svg", actions: false, config, tooltip: { theme: "custom" } };
  const draw = (place) => {
    if (place.dataset.drawn) return;
    place.dataset.drawn = "1";
    vegaEmbed(place, specs[Number(place.dataset.chart)], options).catch((error) => {
      place.textContent = "This chart cannot be drawn: " + error.message;
      place.dataset.failed = "1";
    });
  };
  const hidden = (place) => place.closest("details:not([open])");
  const all = () => [...document.querySelectorAll(".chart")];
  all().filter((place) => !hidden(place)).forEach(draw);
  document.querySelectorAll("details").forEach((part) =>
    part.addEventListener("toggle", () => part.open && part.querySelectorAll(".chart").forEach(draw)));
})();
