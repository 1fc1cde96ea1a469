"use strict";
(() => {
  const root = document.documentElement;
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 4]];
  const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 1e5, 1e6];
  const charts = [];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const faint = (color) => color + "26";
  const short = (value) => (value == null ? "" : String(Number(value.toPrecision(4))));
  // uPlot's own labels have three decimals: those of a small gap would all be 0.
  function labels(_, ticks, axis, space, step) {
    const largest = Math.max(...ticks.map(Math.abs));
    const power = largest >= 1e5 || largest < 1e-3 ? Math.floor(Math.log10(largest)) : 0;
    const isWhole = (part) => Math.abs(part - Math.round(part)) <= 1e-6 * part;
    let digits = 0;
    while (digits < 12 && !isWhole(step * 10 ** (digits - power))) digits += 1;
    const named = (value) => (value / 10 ** power).toFixed(digits) + (power ? "e" + power : "");
    return ticks.map((value) => (value === 0 ? "0" : named(value)));
  }
  const isDecade = (value) => Math.abs(Math.log10(value) % 1) < 1e-6;
  const decades = (_, ticks) => ticks.map((value) => (isDecade(value) ? value : null));
  const decade = (value) => (value < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(1))));
  const decadeLabels = (_, ticks) => ticks.map((value) => (value == null ? "" : decade(value)));
  function ends(_, low, high) {
    if (low == null) return [0, 1];
    if (low < high) return uPlot.rangeNum(low, high, 0.1, true);
    const room = Math.abs(low) * 0.05;
    return room ? [low - room, low + room] : [0, 1];
  }
  function swatch(at) {
    const [svg, line] = ["svg", "path"].map((kind) => document.createElementNS("http://www.w3.org/2000/svg", kind));
    const drawn = { class: "l l" + (at % 6), d: "M0 5H28", "stroke-dasharray": DASHES[at % 6].join(" ") };
    Object.entries(drawn).forEach(([name, value]) => line.setAttribute(name, value));
    svg.setAttribute("class", "swatch");
    svg.append(line);
    return svg;
  }
  function seriesOf(plot) {
    const columns = [plot.xs], series = [{ label: plot.x, value: (_, x) => short(x) }], bands = [], swatches = [null];
    const points = { show: plot.xs.length < 30, size: 5 };
    plot.lines.forEach((line, at) => {
      const color = css("--c" + (at % 6));
      const look = plot.log ? { fill: faint(color), width: 1, paths: uPlot.paths.bars({ size: [1], align: 0 }), points: { show: false } }
        : { width: 2, dash: DASHES[at % 6], points };
      series.push({ label: line.name, stroke: color, spanGaps: false, value: (_, y) => short(y), ...look });
      columns.push(line.ys);
      swatches.push(plot.log ? null : swatch(at));
      if (line.low.length) {
        const mean = series.length;
        series.push({ label: line.name + ", high", stroke: "transparent", points: { show: false } });
        series.push({ label: line.name + ", low", stroke: "transparent", points: { show: false } });
        swatches.push(null, null);
        columns.push(line.high, line.low);
        bands.push({ series: [mean, mean + 1], fill: faint(color) });
      }
    });
    return { columns, series, bands, swatches };
  }
  function drawOne(place, plot) {
    const fg = css("--fg"), line = css("--line"), { columns, series, bands, swatches } = seriesOf(plot);
    const axis = { stroke: fg, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, values: labels };
    const x = { ...axis, label: plot.x, size: 32, labelSize: 16, labelFont: "12px system-ui, sans-serif", labelGap: 0 };
    if (plot.log) Object.assign(x, { values: decadeLabels, filter: decades, grid: { ...axis.grid, filter: decades } });
    if (plot.x === "step") x.incrs = WHOLE;
    const scales = { x: { time: false, distr: plot.log ? 3 : 1 }, y: { range: ends } };
    const cursor = { sync: { key: plot.x } }, legend = { markers: { show: false } };
    const width = Math.max(200, place.clientWidth);
    const axes = [x, { ...axis, size: 62 }];
    charts.push(new uPlot({ width, height: 230, scales, axes, series, bands, cursor, legend }, columns, place));
    place.querySelectorAll(".u-series").forEach((row, at) => {
      row.classList.toggle("band", series[at].stroke === "transparent");
      if (swatches[at]) row.querySelector("th").prepend(swatches[at]);
    });
  }
  function draw() {
    charts.splice(0).forEach((chart) => chart.destroy());
    const data = JSON.parse(document.getElementById("plots").textContent);
    document.querySelectorAll(".live").forEach((place) => drawOne(place, data[Number(place.dataset.plot)]));
  }
  root.classList.add("js");
  draw();
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 150); });
  addEventListener("renewed", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
