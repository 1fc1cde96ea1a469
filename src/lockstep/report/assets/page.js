"use strict";
(() => {
  const root = document.documentElement;
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 4]];
  const charts = [];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const faint = (color) => color + "26";
  function draw() {
    charts.splice(0).forEach((chart) => chart.destroy());
    const data = JSON.parse(document.getElementById("plots").textContent);
    document.querySelectorAll(".live").forEach((place) => {
      const plot = data[Number(place.dataset.plot)];
      const fg = css("--fg"), grid = css("--line");
      const axis = { stroke: fg, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
      const columns = [plot.xs], series = [{ label: plot.x }], bands = [];
      plot.lines.forEach((line, at) => {
        const color = css("--c" + (at % 6));
        series.push({ label: line.name, stroke: color, width: 2, dash: DASHES[at % 6], spanGaps: false,
                      points: { show: plot.xs.length < 30, size: 5 } });
        columns.push(line.ys);
        if (line.low.length) {
          const mean = series.length;
          series.push({ label: line.name + ", high", stroke: "transparent", points: { show: false } });
          series.push({ label: line.name + ", low", stroke: "transparent", points: { show: false } });
          columns.push(line.high, line.low);
          bands.push({ series: [mean, mean + 1], fill: faint(color) });
        }
      });
      const isBand = series.map((one) => one.stroke === "transparent");
      const width = Math.max(200, place.clientWidth);
      charts.push(new uPlot({ width, height: 220, scales: { x: { time: false, distr: plot.log ? 3 : 1 } },
        axes: [axis, { ...axis, size: 62 }], series, bands,
        cursor: { sync: { key: plot.x } } }, columns, place));
      place.querySelectorAll(".u-series").forEach((row, at) => row.classList.toggle("band", isBand[at]));
    });
  }
  root.classList.add("js");
  draw();
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 150); });
  addEventListener("renewed", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
