"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  // Okabe-Ito colours, lighter on a dark background; every style also has its own marker.
  const LIGHT = {
    text: "#1a1d21", soft: "#555d66", grid: "#e3e6ea", card: "#f6f7f9",
    roles: { core: "#0072b2", points: "#d55e00", control: "#6b7280", dashed: "#009e73" },
    cycle: ["#0072b2", "#d55e00", "#009e73", "#a0528a", "#7a5b00", "#3a8fc0", "#000000"],
  };
  const DARK = {
    text: "#e8eaed", soft: "#a9b1ba", grid: "#2e343b", card: "#1d2125",
    roles: { core: "#56b4e9", points: "#f0883e", control: "#9aa3ad", dashed: "#3fcf9f" },
    cycle: ["#56b4e9", "#f0883e", "#3fcf9f", "#d99cc4", "#e6c229", "#b7d8ee", "#ffffff"],
  };
  const MARKERS = { core: "circle", points: "triangle", control: "rect", dashed: "rectRot" };
  const CYCLE_MARKERS = ["circle", "triangle", "rectRot", "rect", "star", "crossRot", "cross", "rectRounded"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const theme = () => (dark.matches && !printing ? DARK : LIGHT);
  const figures = report.sections.flatMap((section) => section.figures);
  const charts = new Map();
  let layer = null;

  const number = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace("e+", "e");
    return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 7 : 4 });
  };
  const share = (value) => `${(100 * value).toLocaleString("en", { maximumSignificantDigits: 3 })}%`;
  const shown = (value, axis) => (axis.percent ? share(value) : number(value));

  const between = (spread, axis) => (spread ? ` (${shown(spread[0], axis)} to ${shown(spread[1], axis)})` : "");

  function tick(axis) {
    return function callback(value, index, ticks) {
      if (!axis.log) return axis.percent ? share(value) : Number(value.toPrecision(6)).toLocaleString("en");
      const decades = Math.log10(this.max / this.min);
      const lead = Number(String(value.toExponential()).split("e")[0]);
      const wanted = decades > 3 ? [1] : decades > 1.5 ? [1, 3] : decades > 0.8 ? [1, 2, 3, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
      if (!wanted.includes(Math.round(lead * 100) / 100)) return null;
      if (axis.percent) return share(value);
      if (value >= 1000) return value.toLocaleString("en", { notation: "compact" });
      return value < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3)));
    };
  }

  function axisOptions(axis, colours, extra) {
    return {
      type: axis.log ? "logarithmic" : "linear",
      title: { display: true, text: axis.label, color: colours.soft },
      ticks: { color: colours.soft, callback: tick(axis), maxRotation: 0, autoSkipPadding: 10 },
      grid: { color: colours.grid },
      border: { color: colours.soft },
      ...extra,
    };
  }

  const frameOf = (figure) => (layer in figure.frames ? layer : figure.focus);
  const seriesOf = (figure) => (Object.keys(figure.frames).length ? figure.frames[frameOf(figure)] : figure.series);

  function colourOf(series, place, colours) {
    return series.style === "line" ? colours.cycle[place % colours.cycle.length] : colours.roles[series.style];
  }

  function pointDatasets(figure, colours) {
    const lines = figure.kind === "lines";
    return seriesOf(figure).map((series, place) => {
      const colour = colourOf(series, place, colours);
      const counted = series.of === null ? "" : ` (${series.points.length} of ${series.of.toLocaleString("en")})`;
      const dense = series.points.length > 60;
      return {
        label: series.name + counted,
        data: series.points.map(([x, y]) => ({ x, y })),
        showLine: lines && series.style !== "points",
        borderColor: colour,
        backgroundColor: lines ? colour : `${colour}b0`,
        borderWidth: lines ? 2 : 1,
        borderDash: series.style === "dashed" ? [6, 4] : series.style === "control" && lines ? [2, 3] : [],
        pointStyle: series.style === "line" ? CYCLE_MARKERS[place % CYCLE_MARKERS.length] : MARKERS[series.style],
        pointRadius: lines ? (series.style === "points" ? 7 : dense ? 0 : 3) : series.style === "control" ? 2.5 : 4,
        pointHitRadius: 8,
        clip: figure.kind === "lines" ? 8 : undefined,
        order: series.style === "points" || series.style === "core" ? 0 : 1,
      };
    });
  }

  function barDatasets(figure, colours) {
    return figure.series.map((series, place) => ({
      label: series.name,
      data: series.values,
      backgroundColor: colourOf(series, place, colours),
      minBarLength: figure.kind === "spans" ? 5 : 0,
      grouped: figure.kind === "bars",
      maxBarThickness: 22,
    }));
  }

  function tooltip(figure) {
    return {
      callbacks: {
        title: (items) => {
          const item = items[0];
          if (figure.categories.length) return figure.categories[item.dataIndex];
          return `${figure.x.label}: ${shown(item.parsed.x, figure.x)}`;
        },
        label: (item) => {
          const name = item.dataset.label;
          if (figure.kind === "spans") return `${name}: layers ${item.raw[0]} to ${item.raw[1]}`;
          const across = figure.kind === "bars";
          const spread = seriesOf(figure)[item.datasetIndex].spread[item.dataIndex];
          const axis = across ? figure.x : figure.y;
          return `${name}: ${shown(across ? item.parsed.x : item.parsed.y, axis)}${between(spread, axis)}`;
        },
      },
    };
  }

  // A dashed vertical line at the figure's mark.
  const markLine = {
    id: "mark",
    afterDatasetsDraw(chart) {
      const { figure, colours } = chart.config.options.surgeon;
      if (figure.mark === null) return;
      const at = chart.scales.x.getPixelForValue(figure.mark);
      const { top, bottom } = chart.chartArea;
      const pen = chart.ctx;
      pen.save();
      pen.strokeStyle = pen.fillStyle = colours.soft;
      pen.setLineDash([4, 4]);
      pen.beginPath();
      pen.moveTo(at, top);
      pen.lineTo(at, bottom);
      pen.stroke();
      pen.font = "12px sans-serif";
      pen.fillText(shown(figure.mark, figure.x), at + 4, top + 12);
      pen.restore();
    },
  };

  // A line from low to high, along the axis of values, at every point or bar that has an interval.
  const whiskers = {
    id: "whiskers",
    afterDatasetsDraw(chart) {
      const { figure, colours } = chart.config.options.surgeon;
      const pen = chart.ctx;
      seriesOf(figure).forEach((series, place) => {
        if (!series.spread.length || !chart.isDatasetVisible(place)) return;
        pen.save();
        pen.strokeStyle = figure.kind === "lines" ? colourOf(series, place, colours) : colours.text;
        pen.lineWidth = 1.5;
        chart.getDatasetMeta(place).data.forEach((point, n) => {
          const spread = series.spread[n];
          if (!spread) return;
          const scale = figure.kind === "bars" ? chart.scales.x : chart.scales.y;
          const [low, high] = spread.map((end) => scale.getPixelForValue(end));
          pen.beginPath();
          pen.moveTo(...(figure.kind === "bars" ? [low, point.y] : [point.x, low]));
          pen.lineTo(...(figure.kind === "bars" ? [high, point.y] : [point.x, high]));
          pen.stroke();
        });
        pen.restore();
      });
    },
  };

  function scales(figure, colours) {
    const layers = figure.x.label.startsWith("decoder layer");
    const fixed = (axis) => (axis.percent && !axis.log && figure.kind !== "scatter" ? { min: 0, max: 1 } : {});
    const category = { type: "category", labels: figure.categories };
    const names = { color: colours.soft, autoSkip: figure.kind === "stacked", maxRotation: 0 };
    const title = (axis) => ({ display: true, text: axis.label, color: colours.soft });
    if (figure.kind === "stacked") {
      return {
        x: { ...category, stacked: true, title: title(figure.x), ticks: names, grid: { display: false } },
        y: axisOptions(figure.y, colours, { stacked: true, beginAtZero: true, ...fixed(figure.y) }),
      };
    }
    if (figure.kind === "bars" || figure.kind === "spans") {
      const reach = layers ? { min: 0, max: lastLayer(figure) } : fixed(figure.x);
      return {
        x: axisOptions(figure.x, colours, reach),
        y: { ...category, ticks: names, title: title(figure.y), grid: { color: colours.grid } },
      };
    }
    const whole = layers ? { min: 0, max: lastLayer(figure) } : {};
    const x = axisOptions(figure.x, colours, { ...whole, ...fixed(figure.x) });
    if (figure.categories.length) x.ticks.callback = (value) => figure.categories[value] ?? null;
    if (figure.categories.length || layers) x.ticks.precision = 0;
    const floor = seriesOf(figure).every((s) => s.points.every((point) => point[1] >= 0)) && !figure.y.log ? { min: 0 } : {};
    return { x, y: axisOptions(figure.y, colours, { ...floor, ...fixed(figure.y) }) };
  }

  function lastLayer(figure) {
    const places = figure.series.flatMap((s) => [...s.points.map(([x]) => x), ...s.values.filter(Boolean).flat()]);
    return Math.max(...places, ...figures.flatMap((f) => Object.keys(f.frames).map(Number)));
  }

  function options(figure, colours) {
    const bars = ["stacked", "bars", "spans"].includes(figure.kind);
    return {
      surgeon: { figure, colours },
      animation: false,
      responsive: true,
      maintainAspectRatio: false,
      devicePixelRatio: Math.max(2, window.devicePixelRatio || 1),
      indexAxis: figure.kind === "bars" || figure.kind === "spans" ? "y" : "x",
      interaction: bars ? { mode: "index", axis: figure.kind === "stacked" ? "x" : "y", intersect: false } : { mode: "nearest", intersect: false },
      onHover: figure.id === "lp-concentration" ? pick : undefined,
      onClick: figure.id === "lp-concentration" ? pick : undefined,
      scales: scales(figure, colours),
      plugins: {
        legend: {
          display: seriesOf(figure).length > 1,
          labels: { sort: (a, b) => a.datasetIndex - b.datasetIndex, color: colours.text, usePointStyle: !bars, boxHeight: 7, boxWidth: bars ? 14 : 9 },
        },
        tooltip: tooltip(figure),
      },
    };
  }

  function pick(_, found, chart) {
    if (found.length) setLayer(chart.data.datasets[found[0].datasetIndex].data[found[0].index].x);
  }

  function draw(figure) {
    const canvas = document.getElementById(`chart-${figure.id}`);
    if (!canvas) return;
    const colours = theme();
    const bars = ["stacked", "bars", "spans"].includes(figure.kind);
    if (figure.kind === "bars" || figure.kind === "spans") {
      canvas.parentElement.style.height = `${110 + 18 * figure.categories.length * Math.max(1, figure.kind === "bars" ? figure.series.length : 1)}px`;
    }
    const data = { datasets: bars ? barDatasets(figure, colours) : pointDatasets(figure, colours) };
    if (bars) data.labels = figure.categories;
    const known = charts.get(figure.id);
    if (known) {
      known.data = data;
      known.options = options(figure, colours);
      known.update("none");
    } else {
      charts.set(figure.id, new Chart(canvas, { type: bars ? "bar" : "scatter", data, options: options(figure, colours), plugins: [markLine, whiskers] }));
    }
  }

  function setLayer(chosen) {
    if (chosen === layer) return;
    layer = chosen;
    for (const figure of figures.filter((f) => Object.keys(f.frames).length)) {
      const control = document.getElementById(`layer-${figure.id}`);
      const layers = Object.keys(figure.frames).map(Number).sort((a, b) => a - b);
      control.value = String(Math.max(0, layers.indexOf(frameOf(figure))));
      control.setAttribute("aria-valuetext", `layer ${frameOf(figure)}`);
      control.parentElement.querySelector("output").textContent = String(frameOf(figure));
      draw(figure);
      fill(document.querySelector(`details[data-figure="${figure.id}"]`), figure);
    }
  }

  function cell(row, kind, text) {
    const made = document.createElement(kind);
    made.textContent = text;
    if (kind === "th") made.scope = "col";
    else made.className = "number";
    row.appendChild(made);
  }

  // The chart's numbers as a table, filled when it is opened.
  function fill(details, figure) {
    if (!details.open) return;
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    const body = table.createTBody();
    if (figure.categories.length && !figure.series.some((s) => s.points.length)) {
      cell(head, "th", figure.kind === "stacked" ? figure.x.label : figure.y.label);
      figure.series.forEach((series) => cell(head, "th", series.name));
      figure.categories.forEach((name, place) => {
        const row = body.insertRow();
        cell(row, "td", name);
        const axis = figure.kind === "stacked" ? figure.y : figure.x;
        figure.series.forEach(({ values }, n) => {
          const value = values[place];
          const spread = between(figure.series[n].spread[place], axis);
          cell(row, "td", value === null ? "" : Array.isArray(value) ? value.join(" to ") : shown(value, axis) + spread);
        });
      });
    } else {
      ["series", figure.x.label, figure.y.label].forEach((name) => cell(head, "th", name));
      for (const series of seriesOf(figure)) {
        series.points.forEach(([x, y], n) => {
          const row = body.insertRow();
          const value = shown(y, figure.y) + between(series.spread[n], figure.y);
          [series.name, figure.categories[x] ?? shown(x, figure.x), value].forEach((text) => cell(row, "td", text));
        });
      }
    }
    details.querySelector(".scroll").replaceChildren(table);
  }

  for (const figure of figures.filter((f) => f.kind !== "matrix")) {
    const details = document.querySelector(`details[data-figure="${figure.id}"]`);
    details.addEventListener("toggle", () => fill(details, figure));
    const control = document.getElementById(`layer-${figure.id}`);
    if (control) {
      const layers = Object.keys(figure.frames).map(Number).sort((a, b) => a - b);
      control.addEventListener("input", () => setLayer(layers[Number(control.value)]));
    }
  }
  const redraw = () => figures.forEach(draw);
  const framed = figures.find((f) => Object.keys(f.frames).length);
  redraw();
  if (framed) setLayer(framed.focus);
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { printing = true; redraw(); charts.forEach((chart) => chart.resize()); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); charts.forEach((chart) => chart.resize()); });
  document.documentElement.dataset.drawn = String(charts.size);
})();
