"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const config = {
    responsive: true, displaylogo: false, typesetMath: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  const copy = (value) => JSON.parse(JSON.stringify(value));

  // --- Cosines: the pairs above the diagonal, as 16-bit numbers.
  const unpack = (text, count) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const steps = new DataView(bytes.buffer);
    const rows = Array.from({ length: count }, () => new Array(count).fill(1));
    let at = 0;
    for (let i = 0; i < count; i += 1) {
      for (let j = i + 1; j < count; j += 1, at += 2) {
        const step = steps.getInt16(at, true);
        rows[i][j] = rows[j][i] = step === page.none ? null : step / page.steps;
      }
    }
    return rows;
  };
  const extremes = (rows) => {
    let low = null, high = null;
    rows.forEach((row, i) => row.forEach((value, j) => {
      if (j <= i || value === null) return;
      if (low === null || value < low.value) low = { value, i, j };
      if (high === null || value > high.value) high = { value, i, j };
    }));
    return { low, high };
  };

  // --- Tables: cells are set as text, so that nothing in a name is read as markup.
  const table = (caption, heads, rows) => {
    const made = document.createElement("table");
    made.createCaption().textContent = caption;
    const cell = (tag, text, scope) => {
      const one = document.createElement(tag);
      one.textContent = text;
      if (scope) one.scope = scope;
      if (typeof text === "number" || /^[-–]?[\d.]+$/.test(text)) one.className = "number";
      return one;
    };
    const head = made.createTHead().insertRow();
    heads.forEach((text) => head.append(cell("th", text, "col")));
    const body = made.createTBody();
    rows.forEach((row) => {
      const line = body.insertRow();
      row.forEach((text, i) => line.append(i ? cell("td", text) : cell("th", text, "row")));
    });
    return made;
  };
  const behind = (id, build) => {
    const details = byId(id);
    const fill = () => { if (details.open) details.querySelector(".scroll").replaceChildren(build()); };
    details.ontoggle = fill;
    fill();
  };

  // --- Persona vectors: one collection and one layer at a time.
  const vectors = () => {
    const chooser = byId("collection"), slider = byId("layer"), shown = byId("layer-shown");
    const mean = byId("mean"), stretch = byId("stretch"), attribute = byId("attribute");
    let collection, known = new Map();

    const cosinesOf = (kind, index) => {
      const key = `${kind} ${index}`;
      const { similarity } = collection;
      if (!known.has(key)) known.set(key, unpack(similarity[kind][index], similarity.names.length));
      return known.get(key);
    };
    const layer = () => collection.layers[slider.value];
    const kind = () => (mean.checked && collection.similarity.centred ? "centred" : "raw");

    const drawSimilarity = () => {
      const { similarity } = collection, rows = cosinesOf(kind(), Number(slider.value));
      const { low, high } = extremes(rows);
      const trace = { ...similarity.trace, z: rows };
      if (stretch.checked && low !== null && high.value > low.value) {
        if (kind() === "raw") {
          Object.assign(trace, { colorscale: "Cividis", zmin: low.value, zmax: high.value });
        } else {
          const most = Math.max(Math.abs(low.value), Math.abs(high.value));
          Object.assign(trace, { zmin: -most, zmax: most });
        }
      }
      Plotly.react("similarity", [trace], copy(similarity.layout), config);
      const { names } = similarity;
      const pair = ({ value, i, j }) => `${names[i]} and ${names[j]} (${value.toFixed(3)})`;
      const words = low === null ? "There is nothing to compare." : `Most alike: ${pair(high)}. Least: ${pair(low)}.`;
      const what = `layer ${layer().number}, ${kind() === "raw" ? "whole vectors" : "mean persona removed"}`;
      byId("similarity-words").textContent = `At ${what}. ${words}`;
      byId("similarity").setAttribute("aria-label", `Heatmap of cosine similarity, ${what}. ${words}`);
      behind("similarity-table", () => {
        if (names.length <= 30) {
          return table(`Cosine similarity, ${what}`, ["persona", ...names],
            rows.map((row, i) => [names[i], ...row.map((value) => fixed(value, 3))]));
        }
        const nearest = rows.map((row, i) => row.map((value, j) => ({ value, j }))
          .filter(({ value, j }) => j !== i && value !== null).sort((a, b) => b.value - a.value));
        const told = (found) => (found ? [names[found.j], fixed(found.value, 3)] : ["", "–"]);
        return table(`Cosine similarity, ${what}: for each persona the nearest and the farthest`,
          ["persona", "nearest", "cosine", "farthest", "cosine"],
          nearest.map((found, i) => [names[i], ...told(found[0]), ...told(found[found.length - 1])]));
      });
    };

    const drawMap = () => {
      const { map } = collection;
      byId("map-part").hidden = map === null;
      if (map === null) return;
      const index = Number(slider.value), [xs, ys] = map.places[index], colouring = map.colourings[attribute.value];
      const traces = colouring.traces.map((trace, i) => {
        const members = colouring.members[i];
        return { ...trace, x: members.map((j) => xs[j]), y: members.map((j) => ys[j]) };
      });
      const layout = copy(map.layout);
      [layout.xaxis, layout.yaxis].forEach((axis, i) => {
        axis.title.text = `component ${i + 1} (${Math.round(100 * map.shares[index][i])}% of variance)`;
      });
      const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
      layout.legend.title.text = colouring.traces.length > 1 ? `${plain(colouring.title)} ` : "";
      Plotly.react("map", traces, layout, config);
      byId("map").setAttribute("aria-label", `Map of ${xs.length} personas on two principal components at layer `
        + `${layer().number}, coloured by ${colouring.title}; the table below has the coordinates.`);
      behind("map-table", () => table(`Coordinates at layer ${layer().number}`,
        ["persona", colouring.title, "component 1", "component 2"],
        collection.names.map((name, j) => [name, colouring.values[j], xs[j], ys[j]])));
    };

    const drawNorms = () => {
      const { norms } = collection, layout = copy(norms.layout);
      layout.shapes = [{ type: "line", x0: layer().number, x1: layer().number, y0: 0, y1: 1, yref: "paper",
        line: { color: "#000", width: 1.5, dash: "dash" } }];
      Plotly.react("norms", copy(norms.data), layout, config);
    };

    const drawLayer = () => {
      const { number, hook } = layer();
      const words = `layer ${number}${hook ? ` (${hook})` : ""}`;
      shown.textContent = words;
      slider.setAttribute("aria-valuetext", words);
      drawSimilarity();
      drawMap();
      drawNorms();
    };

    const drawCollection = () => {
      collection = page.collections[chooser.value];
      known = new Map();
      slider.max = collection.layers.length - 1;
      slider.value = Math.floor(collection.layers.length / 2);
      mean.disabled = collection.similarity.centred === null;
      byId("left-out").textContent = collection.left_out;
      byId("printed-collection").textContent = collection.label;
      const colourings = collection.map === null ? [] : collection.map.colourings;
      attribute.replaceChildren(...colourings.map(({ title }, i) => new Option(title, i)));
      attribute.disabled = colourings.length < 2;
      if (colourings.length > 1) attribute.value = 1;
      drawLayer();
      behind("norms-table", () => table(`Norms over the personas of ${collection.label}`,
        ["layer", "smallest", "median", "largest", "median without the mean persona"], collection.norms.table));
    };

    chooser.replaceChildren(...page.collections.map(({ label }, i) => new Option(label, i)));
    chooser.onchange = drawCollection;
    slider.oninput = drawLayer;
    mean.onchange = stretch.onchange = drawSimilarity;
    attribute.onchange = drawMap;
    drawCollection();
  };

  if (page.collections.length) vectors();
  page.profiles.forEach(({ id, figure }) => Plotly.newPlot(id, figure.data, figure.layout, config));
  document.documentElement.dataset.ready = "yes";
})();
