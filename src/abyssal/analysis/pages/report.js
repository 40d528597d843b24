// The report of one run or several (analysis/report.py gives the data), and its live form (analysis/live.py).

const FEW_LAYERS = 8; // more are not shown all at once
const dark = matchMedia("(prefers-color-scheme: dark)");
const slots = new Map(); // a chart's key -> {element, figure, near, stale}
const chosen = { run: 0, layer: null, step: null }; // null: whatever is the default
let shown = null; // the data on the page

// Charts are drawn when they come near the part of the page that is seen: a run may have hundreds.
const nearness = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const slot = slots.get(entry.target.dataset.chart);
    slot.near = entry.isIntersecting;
    if (slot.near && slot.stale) paint(slot);
  }
}, { rootMargin: "200px" });

function paint(slot) {
  slot.stale = false;
  draw(slot.element, themed(slot.figure));
}

// An even load is the page's ground, in the dark too.
function themed(figure) {
  if (!dark.matches) return figure;
  const scale = [[0, "#5aa2f5"], [0.5, "#171b22"], [1, "#ff9d5c"]];
  return { ...figure, data: figure.data.map((trace) => (trace.type === "heatmap" ? { ...trace, colorscale: scale } : trace)) };
}

dark.addEventListener("change", () => {
  for (const slot of slots.values()) {
    slot.stale = true;
    if (slot.near) paint(slot);
  }
});

// The element of the chart called `key`, which shows `figure` from now on. It is kept: zoom survives new data.
function chart(key, figure) {
  let slot = slots.get(key);
  if (!slot) {
    slot = { element: make("div", { class: "chart", "data-chart": key }), near: false };
    slots.set(key, slot);
    nearness.observe(slot.element);
  }
  const compact = innerWidth < 600;
  slot.figure = { ...figure, layout: { legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 }, ...figure.layout } };
  const legend = figure.data.length > 1 ? figure.data.some((trace) => trace.showlegend) : figure.layout.showlegend;
  slot.figure.layout.showlegend = Boolean(legend);
  slot.figure.layout.margin = { l: 48, r: 12, t: legend ? 60 : 36, b: 40 };
  slot.figure.layout.title = { ...figure.layout.title, font: { size: compact ? 12 : 14 }, y: 0.98, yanchor: "top", yref: "container" };
  slot.element.style.minHeight = `${figure.layout.height ?? 280}px`;
  slot.stale = true;
  if (slot.near && slot.element.isConnected) paint(slot);
  return slot.element;
}

// Puts `children` into `place`, and leaves it alone where they are there already.
function fill(place, children) {
  const wanted = children.filter((child) => child !== null);
  const same = wanted.length === place.children.length && wanted.every((child, i) => child === place.children[i]);
  if (!same) place.replaceChildren(...wanted);
}

function fillCharts(place, prefix, figures) {
  fill(place, Object.entries(figures).map(([name, figure]) => chart(`${prefix}${name}`, figure)));
}

// A labelled list to choose from, with buttons to the one before and after. options: [[value, text], …]
function choice(place, name, options, value, onchoose) {
  const id = `choose-${name}`;
  const key = JSON.stringify(options);
  let box = place.querySelector(`[data-choice="${name}"]`);
  if (!box) {
    const select = make("select", { id, onchange: () => box.choose(select.value) });
    const go = (by) => () => {
      const next = select.options[select.selectedIndex + by];
      if (next) box.choose(next.value);
    };
    const back = make("button", { type: "button", "aria-label": `${name} before`, onclick: go(-1) }, "‹");
    const forth = make("button", { type: "button", "aria-label": `next ${name}`, onclick: go(1) }, "›");
    box = make("span", { class: "choice", "data-choice": name }, make("label", { for: id }, name), back, select, forth);
    place.append(box);
  }
  box.choose = onchoose;
  const select = box.querySelector("select");
  if (box.dataset.key !== key) {
    select.replaceChildren(...options.map(([v, text]) => make("option", { value: v }, text)));
    box.dataset.key = key;
  }
  select.value = value;
}

function show(data) {
  update(data);
  if (data.live) follow(data.live); // goes on for as long as there is news
}

function update(data) {
  shown = data;
  const { runs } = data;
  const alone = runs.length === 1;
  document.getElementById("title").textContent = alone ? runs[0].name : `${runs.length} runs`;
  const paths = runs.filter((run) => run.path !== run.name).map((run) => run.path);
  document.getElementById("subtitle").textContent = paths.join(" · ");
  if (data.live) showState(data.live.state);
  showFigures(runs);
  showDifferences(runs, data.differences);
  const training = document.getElementById("training");
  if (Object.keys(data.charts).length) fillCharts(training, "", data.charts);
  else training.replaceChildren(make("p", { class: "dim" }, "No step is done yet."));
  showExperts();
  showSamples();
  showConfig(runs);
  const notes = runs.flatMap((run) => run.notes.map((note) => (alone ? note : `${run.name}: ${note}`)));
  const list = make("ul", {}, ...notes.map((note) => make("li", {}, note)));
  document.getElementById("notes").replaceChildren(...(notes.length ? [make("h2", {}, "Notes"), list] : []));
}

function heading(run, i) {
  const swatch = make("span", { class: "swatch" });
  swatch.style.background = run.colour;
  return make("span", {}, shown.runs.length > 1 ? swatch : null, run.name);
}

function showFigures(runs) {
  const place = document.getElementById("figures");
  if (runs.length === 1) {
    const known = runs[0].figures.filter(([, value]) => value !== "–");
    const cards = known.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    place.replaceChildren(make("dl", { class: "cards" }, ...cards));
    return;
  }
  const names = [...new Set(runs.flatMap((run) => run.figures.map(([name]) => name)))];
  const value = (run, name) => run.figures.find(([other]) => other === name)?.[1] ?? "–";
  place.replaceChildren(makeTable(["", ...runs.map(heading)], names.map((name) => [name, ...runs.map((run) => value(run, name))])));
}

function showDifferences(runs, rows) {
  if (runs.length === 1) return;
  const none = make("p", {}, "The recipes are the same in every field.");
  const table = rows.length ? makeTable(["field", ...runs.map(heading)], rows) : none;
  if (rows.length) table.classList.add("wrapped");
  document.getElementById("differences").replaceChildren(make("h2", {}, "Where the recipes differ"), table);
}

function showExperts() {
  const { runs, overlaid } = shown;
  const places = ["no-experts", "curves", "layers", "expert-choices", "layer-choices"].map((id) => document.getElementById(id));
  const [none, curves, layers, choices, layerChoices] = places;
  const routed = runs.map((run, i) => [i, run]).filter(([, run]) => run.experts);
  const without = runs.filter((run) => !run.experts);
  const waiting = shown.live && !Object.keys(shown.charts).length;
  const missing = runs.length === 1 ? "This model has no experts." : `No experts: ${without.map((run) => run.name).join(", ")}.`;
  fill(none, []);
  none.textContent = without.length && !waiting ? missing : "";
  if (!routed.length) return;
  if (!runs[chosen.run].experts) chosen.run = routed[0][0];
  if (routed.length > 1) {
    choice(choices, "run", routed.map(([i, run]) => [String(i), run.name]), String(chosen.run), (value) => {
      chosen.run = Number(value);
      showExperts();
    });
  }
  const { experts } = runs[chosen.run];
  fillCharts(curves, `${chosen.run}/`, experts.curves);
  const numbers = experts.layers.map((row) => row.layer);
  const few = numbers.length <= FEW_LAYERS;
  const known = chosen.layer === "all" ? few : numbers.includes(chosen.layer);
  const layer = known ? chosen.layer : few ? "all" : numbers[0];
  const options = experts.layers.map((row) => [String(row.layer), row.name]);
  choice(layerChoices, "layer", few ? [["all", "all"], ...options] : options, String(layer), (value) => {
    chosen.layer = value === "all" ? "all" : Number(value);
    showExperts();
  });
  const rows = experts.layers.filter((row) => layer === "all" || row.layer === layer);
  fill(layers, rows.map((row) => {
    const key = `${chosen.run}/${row.layer}`;
    const place = layers.querySelector(`[data-layer="${key}"]`) ?? make("div", { class: "charts pair", "data-layer": key });
    const beside = overlaid.find((other) => other.layer === row.layer)?.charts ?? {};
    const figures = { load: row.load, ...(row.bias ? { bias: row.bias } : {}) };
    const own = Object.entries(figures).map(([name, figure]) => chart(`${key}/${name}`, figure));
    const common = Object.entries(beside).map(([name, figure]) => chart(`all/${row.layer}/${name}`, figure));
    fill(place, [...own, ...common]);
    return place;
  }));
}

function showSamples() {
  const { runs } = shown;
  const place = document.getElementById("samples");
  const steps = [...new Set(runs.flatMap((run) => run.samples.map((row) => row.step)))].sort((a, b) => a - b);
  if (!steps.length) {
    place.replaceChildren(make("p", { class: "dim" }, "No samples were taken."));
    return;
  }
  const step = steps.includes(chosen.step) ? chosen.step : steps.at(-1);
  choice(document.getElementById("sample-choices"), "step", steps.map((s) => [String(s), s.toLocaleString("en")]), String(step), (value) => {
    chosen.step = Number(value) === steps.at(-1) ? null : Number(value); // who looks at the last sees the next one, too
    showSamples();
  });
  const taken = runs.map((run) => run.samples.find((row) => row.step === step)?.samples ?? []);
  // A prompt may be given twice: its first, second, … sample are beside each other.
  const keys = taken.map((samples) => samples.map(([prompt], i) => JSON.stringify([prompt, samples.slice(0, i).filter(([other]) => other === prompt).length])));
  const rows = [...new Set(keys.flat())].map((key) => {
    const cells = runs.map((run, i) => {
      const sample = taken[i][keys[i].indexOf(key)];
      const text = sample
        ? make("div", { class: "text" }, make("span", { class: "prompt" }, sample[0]), sample[1])
        : make("p", { class: "dim" }, "no such sample at this step");
      return make("div", {}, runs.length > 1 ? make("h4", {}, heading(run)) : null, text);
    });
    const side = make("div", { class: "side" }, ...cells);
    side.style.gridTemplateColumns = `repeat(${runs.length}, minmax(${runs.length > 1 ? "min(100%, 16rem)" : "0"}, 1fr))`;
    return side;
  });
  place.replaceChildren(...rows);
}

function showConfig(runs) {
  const place = document.getElementById("config");
  const key = JSON.stringify(runs.map((run) => [run.name, run.model, run.recipe]));
  if (place.dataset.key === key) return; // what was folded stays so
  place.dataset.key = key;
  const names = [...new Set(runs.flatMap((run) => run.model.map(([name]) => name)))];
  const value = (run, name) => run.model.find(([other]) => other === name)?.[1] ?? "–";
  const rows = names.map((name) => [name, ...runs.map((run) => value(run, name))]);
  const head = runs.length === 1 ? ["model", ""] : ["model", ...runs.map(heading)];
  const recipes = runs.filter((run) => run.recipe !== null).map((run) => make("details", { open: runs.length === 1 ? "" : null },
    make("summary", {}, runs.length === 1 ? "recipe.yaml" : `${run.name}: recipe.yaml`), make("pre", { class: "recipe", tabindex: "0" }, run.recipe)));
  place.replaceChildren(rows.length ? makeTable(head, rows) : "", ...recipes);
}

function showState(state) {
  const run = shown.runs[0];
  const texts = {
    live: "live: this page follows the training",
    finished: "finished",
    stopped: "stopped before its last step",
    failed: "training ended with an error",
    lost: "connection lost — showing the last state",
  };
  const place = document.getElementById("state");
  const now = state === "lost" && run.done ? "finished" : state;
  place.hidden = false;
  place.dataset.state = now;
  if (place.textContent !== texts[now]) place.textContent = texts[now]; // said once by screen readers
}

// The server answers when there is something new, or after a while that there is not.
async function follow({ version }) {
  const page = Math.random().toString(36).slice(2);
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  for (;;) {
    try {
      const response = await fetch(`data.json?after=${version}&page=${page}`, { cache: "no-store" });
      if (!response.ok) throw new Error(response.statusText);
      if (response.status === 200) {
        const data = await response.json();
        version = data.live.version;
        update(data);
        if (data.live.state !== "live") return;
      }
    } catch (error) {
      showState("lost");
      if (shown.runs[0].done) return;
      await pause(5000); // it may be resumed on the same port
    }
  }
}
