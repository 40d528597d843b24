// The text with its tokens coloured by expert, a legend, figures on hover, charts. Colours are classes (e17: an expert's hue,
// q0 to q9: how strong, off: not meant), so that a change of layer writes one class name a token; listeners sit on the boxes.

const NONE = -1;
const LEVELS = 10;
const BELOW = { orientation: "h", yref: "container", y: 0, yanchor: "bottom" };
let lens; // the data, unpacked
let now = { layer: 0, choice: 0, colour: "expert", expert: null, token: null, kept: false };
const byId = (id) => document.getElementById(id);

function array(packed, Type) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
}

const percent = (share, digits = 1) => (share === null ? "–" : `${(100 * share).toFixed(digits)}%`);
const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const hue = (expert) => (expert * 137.508) % 360;

// A layer's arrays are unpacked when they are first looked at.
function layerAt(index) {
  const layer = lens.layers[index];
  if (layer.ready) return layer;
  const choices = (from) => ({ ...from, indices: array(from.indices, Int16Array), steps: array(from.weights, Uint16Array) });
  Object.assign(layer, choices(layer), { ready: true });
  for (const [key, Type] of [["moved", Uint8Array], ["shared", Uint8Array], ["top", Int32Array], ["frequent", Int32Array], ["times", Int32Array]]) {
    if (layer[key] !== null) layer[key] = array(layer[key], Type);
  }
  layer.load = Array.from({ length: layer.experts }, (_, e) => layer.used.reduce((sum, text) => sum + text[e], 0));
  layer.total = layer.load.reduce((a, b) => a + b, 0);
  if (layer.other) layer.other = choices(layer.other);
  return layer;
}

const weightAt = (of, at) => (of.steps[at] * of.largest) / 65535;

// The weight of an expert for a token, null where it was not chosen.
function weightOf(of, choices, token, expert) {
  for (let at = token * choices; at < (token + 1) * choices; at++) if (of.indices[at] === expert) return weightAt(of, at);
  return null;
}

// The part of a token's choices that the other model made too.
function agreement(layer, token) {
  const from = token * layer.choices, theirs = [...layer.other.indices.subarray(from, from + layer.choices)];
  if (layer.indices[from] === NONE || theirs[0] === NONE) return null;
  let same = 0;
  for (let at = from; at < from + layer.choices; at++) {
    const found = theirs.indexOf(layer.indices[at]);
    if (found >= 0) { same++; theirs.splice(found, 1); }
  }
  return same / layer.choices;
}

async function show(data) {
  lens = { ...data, ids: array(data.ids, Int32Array), positions: array(data.positions, Int32Array), spans: [], base: [], shown: [] };
  lens.occurrences = new Map();
  for (const id of lens.ids) lens.occurrences.set(id, (lens.occurrences.get(id) ?? 0) + 1);
  const texts = data.texts.map((t) => `${t.name} (${t.tokens.toLocaleString("en")} tokens${t.documents > 1 ? `, ${t.documents} documents` : ""}${t.cut ? "; the rest left out" : ""})`);
  byId("about").textContent = `${data.model}${data.other ? `, compared with ${data.other},` : ""} on ${texts.join(", ")}, in windows of ${data.window} tokens.`;
  colours(Math.max(...data.layers.map((layer) => layer.experts)));
  controls();
  writeText();
  byId("legend").append(...data.layers[0].used[0].map((_, e) => make("button", { type: "button", class: `e${e}`, "data-expert": e })));
  listen();
  overview();
  measures();
  if (data.other) {
    byId("drifted").hidden = false;
    byId("changed").append(...data.changed.map((token) => context(token, "")));
  }
  await setLayer(0);
}

function colours(experts) {
  const rules = [];
  for (let e = 0; e < experts; e++) {
    const paint = `oklch(calc(var(--level) + ${[0, -0.05, 0.05][e % 3]}) var(--chroma) ${hue(e).toFixed(1)}`;
    rules.push(`.e${e} { background: ${paint}); }`);
    rules.push(`.t.e${e} { --h: ${hue(e).toFixed(1)}; }`);
  }
  for (let q = 0; q < LEVELS; q++) rules.push(`.t.q${q} { background: oklch(calc(var(--level) - 0.04) calc(var(--chroma) + 0.03) var(--h, 250) / ${(0.08 + (0.92 * q) / (LEVELS - 1)).toFixed(2)}); }`);
  document.head.append(make("style", {}, rules.join("\n")));
}

function controls() {
  const first = lens.layers[0];
  byId("layer").max = lens.layers.length - 1;
  const modes = [["expert", "expert"], ["weight", "weight"]];
  if (lens.layers.some((layer) => layer.shared)) modes.push(["shared", "shared experts' share"]);
  if (lens.layers.some((layer) => layer.moved)) modes.push(["moved", "choices moved by the bias"]);
  if (lens.other) modes.push(["changed", "difference from the other model"]);
  byId("colour").append(...modes.map(([value, text]) => make("option", { value }, text)));
  const perSegment = first.choices / first.segments;
  byId("choice").append(...Array.from({ length: first.choices }, (_, k) => {
    const rank = (k % perSegment) + 1;
    return make("option", { value: k }, first.segments > 1 ? `part ${Math.floor(k / perSegment) + 1}, ${rank}` : String(rank));
  }));
}

// Chunks end at line ends, so that a browser lays out only those in view.
function writeText() {
  const box = byId("text"), starts = new Map(lens.documents.map(([text, start], i) => [start, [text, i]]));
  const ofText = lens.texts.map((_, t) => lens.documents.findIndex(([text]) => text === t));
  let chunk = null, length = 0;
  for (let i = 0; i < lens.count; i++) {
    if (starts.has(i)) {
      const [text, document] = starts.get(i), several = lens.texts[text].documents > 1;
      if (lens.documents.length > 1) box.append(make("div", { class: "document" }, lens.texts[text].name + (several ? `, document ${document - ofText[text] + 1}` : "")));
      chunk = null;
    }
    if (chunk === null) { chunk = make("div", { class: "part" }); box.append(chunk); length = 0; }
    const piece = lens.pieces[i], span = document.createElement("span");
    span.token = i;
    if (piece.includes("\n")) {
      piece.split("\n").forEach((part, n) => span.append(...(n ? [make("i", {}, "↵"), "\n"] : []), part));
    } else span.textContent = piece;
    lens.base.push(`t${piece === "" ? " rest" : ""}${lens.positions[i] === 0 && !starts.has(i) ? " begins" : ""} `);
    lens.spans.push(span);
    chunk.append(span);
    if (++length >= 200 && piece.endsWith("\n")) chunk = null;
  }
}

function recolour() {
  const layer = layerAt(now.layer), { choices } = layer, strong = (share) => `q${Math.max(0, Math.min(LEVELS - 1, Math.round(share * (LEVELS - 1))))}`;
  for (let i = 0; i < lens.count; i++) {
    const at = i * choices, expert = layer.indices[at + now.choice];
    let paint = "off";
    if (expert === NONE) paint = "off";
    else if (now.expert !== null) {
      const weight = weightOf(layer, choices, i, now.expert);
      if (weight !== null) paint = `e${now.expert} ${strong(0.25 + (0.75 * weight) / (layer.largest || 1))}`;
    } else if (now.colour === "expert") paint = `e${expert}`;
    else if (now.colour === "weight") paint = strong(weightAt(layer, at + now.choice) / (layer.largest || 1));
    else if (now.colour === "shared") paint = layer.shared ? strong(layer.shared[i] / 255) : "off";
    else if (now.colour === "moved") paint = layer.moved && layer.moved[i] ? strong(layer.moved[i] / choices) : "off";
    else {
      const same = agreement(layer, i);
      if (same !== null && same < 1) paint = strong(1 - same);
    }
    if (lens.shown[i] !== paint) lens.spans[i].className = lens.base[i] + (lens.shown[i] = paint);
  }
}

let drawing = null;

// Resolves when its charts are drawn, which is done once the slider rests.
function setLayer(index) {
  now.layer = Math.max(0, Math.min(lens.layers.length - 1, index));
  const layer = layerAt(now.layer);
  byId("layer").value = now.layer;
  byId("layer").setAttribute("aria-valuetext", `layer ${layer.name}`);
  byId("layer-name").textContent = layer.name;
  byId("layer-title").textContent = `Layer ${layer.name}`;
  byId("legend").childNodes.forEach((button, e) => {
    button.replaceChildren(String(e), make("small", {}, percent(layer.load[e] / layer.total)));
    button.setAttribute("aria-label", `expert ${e}, ${percent(layer.load[e] / layer.total)} of the choices`);
  });
  recolour();
  if (now.token !== null) showTip(now.token);
  clearTimeout(drawing);
  return new Promise((done) => {
    drawing = setTimeout(() => Promise.all([loadChart(), togetherChart(), showExpert()]).then(done, fail), 60);
  });
}

function select(expert) {
  now.expert = now.expert === expert ? null : expert;
  byId("legend").childNodes.forEach((button, e) => button.setAttribute("aria-pressed", String(e === now.expert)));
  byId("clear").hidden = now.expert === null;
  byId("clear").textContent = `All experts (now: ${now.expert})`;
  byId("colour").disabled = byId("choice").disabled = now.expert !== null;
  recolour();
  loadChart();
  return showExpert();
}

// One line of text around a token, which leads to it.
function context(token, figure, expert = null) {
  const same = (i) => i >= 0 && i < lens.count && lens.starts[i] === lens.starts[token];
  const text = (from, to) => {
    let out = "";
    for (let i = from; i < to; i++) if (same(i)) out += lens.pieces[i];
    return out.replaceAll("\n", "⏎");
  };
  const mark = make("mark", expert === null ? {} : { style: `--h: ${hue(expert).toFixed(1)}` }, text(token, token + 1) || lens.labels[lens.ids[token]]);
  const go = () => { keep(token); byId("text").focus({ preventScroll: true }); };
  return make("li", {}, make("button", { type: "button", "data-token": token, onclick: go }, figure === "" ? null : make("span", { class: "figure" }, figure), make("span", {}, text(token - 8, token), mark, text(token + 1, token + 9))));
}

function showExpert() {
  const box = byId("expert"), e = now.expert, layer = layerAt(now.layer);
  if (e === null) {
    box.replaceChildren(make("p", { class: "dim" }, "Choose an expert to see where it fires in the text, what it is used for most and with which others."));
    return null;
  }
  if (e >= layer.experts) return null;
  const weights = [], { choices } = layer;
  for (let at = 0; at < layer.indices.length; at++) if (layer.indices[at] === e) weights.push(weightAt(layer, at));
  const mean = weights.reduce((a, b) => a + b, 0) / (weights.length || 1);
  const tops = layer.top.length / layer.experts, rows = [], contexts = [];
  for (let n = e * tops; n < (e + 1) * tops; n++) {
    const id = layer.frequent[n], token = layer.top[n];
    if (id >= 0) rows.push([make("code", { dir: "auto" }, lens.labels[id]), layer.times[n], percent(layer.times[n] / (lens.occurrences.get(id) * layer.segments), 0)]);
    if (token >= 0) contexts.push(context(token, weightOf(layer, choices, token, e).toFixed(3), e));
  }
  const texts = lens.texts.length > 1 ? ` Of its choices ${lens.texts.map((t, i) => `${percent(layer.load[e] ? layer.used[i][e] / layer.load[e] : 0, 0)} are in ${t.name}`).join(", ")}.` : "";
  const histogram = make("div", { class: "chart" }), partners = make("div", { class: "chart" });
  box.replaceChildren(
    make("h3", {}, `Expert ${e} in layer ${layer.name}`),
    make("p", {}, `Chosen ${layer.load[e].toLocaleString("en")} times, ${percent(layer.load[e] / layer.total)} of the choices, with a mean weight of ${number(mean)}.${texts}`),
    ...(weights.length ? [make("h3", {}, "Top contexts, by weight"), make("ol", { class: "contexts" }, ...contexts), make("h3", {}, "Most frequent tokens"), makeTable(["token", "times", "of its uses"], rows), histogram, layer.lift ? partners : null] : []),
  );
  const drawn = weights.length ? [draw(histogram, { data: [{ type: "histogram", x: weights, nbinsx: 30, marker: { color: styled("--accent") } }], layout: { title: "Its weights", height: 200, bargap: 0.05, xaxis: { title: { text: "weight", standoff: 4 } }, yaxis: { title: { text: "tokens" } } } })] : [];
  if (weights.length && layer.lift) {
    const row = liftTable(layer)[e].map((value, other) => [value, other]).filter(([value]) => value !== null).sort((a, b) => b[0] - a[0]).slice(0, 12);
    drawn.push(draw(partners, { data: [{ type: "bar", x: row.map(([, other]) => `E${other}`), y: row.map(([value]) => value), marker: { color: styled("--accent") }, hovertemplate: "%{x}: %{y:.2f} times as often as by chance<extra></extra>" }], layout: { title: "Chosen together with", height: 200, xaxis: { type: "category" }, yaxis: { title: { text: "lift" }, rangemode: "tozero" } } }));
  }
  return Promise.all(drawn);
}

// [E][E], null on the diagonal and where an expert was never chosen.
function liftTable(layer) {
  if (!layer.lifts) {
    const steps = array(layer.lift, Uint8Array), n = layer.experts;
    layer.lifts = Array.from({ length: n }, () => Array(n).fill(null));
    for (let i = 0, at = 0; i < n; i++) for (let j = i + 1; j < n; j++, at++) {
      if (steps[at]) layer.lifts[i][j] = layer.lifts[j][i] = 2 ** (((steps[at] - 128) / 127) * 4);
    }
  }
  return layer.lifts;
}

function loadChart() {
  const layer = layerAt(now.layer), x = layer.load.map((_, e) => e);
  const palette = [styled("--accent"), "#d97706", "#0d9488", "#a855f7", "#dc2626", "#65a30d", "#64748b", "#db2777"];
  const data = layer.used.map((used, t) => ({
    type: "bar", name: plain(lens.texts[t].name), x, y: used, hovertemplate: `expert %{x}: %{y} choices<extra>${plain(lens.texts[t].name)}</extra>`,
    marker: { color: palette[t % palette.length], opacity: x.map((e) => (now.expert === null || e === now.expert ? 1 : 0.35)) },
  }));
  if (layer.other) data.push({ type: "scatter", mode: "markers", name: `${plain(lens.other)}, all texts`, x, y: layer.other.load, marker: { symbol: "line-ew-open", size: 12, color: styled("--ink") } });
  return draw(byId("load"), { data, layout: { title: "Load: choices of each expert", height: 340, legend: BELOW, barmode: "stack", showlegend: data.length > 1, xaxis: { title: { text: "expert", standoff: 4 }, ...(x.length <= 32 ? { dtick: 1 } : {}) }, yaxis: { title: { text: "choices" }, rangemode: "tozero" } } });
}

function togetherChart() {
  const layer = layerAt(now.layer);
  if (!layer.lift) {
    byId("together").replaceChildren(make("p", { class: "dim", style: "padding: 1rem" }, "A token goes to one expert here, so none are chosen together."));
    return null;
  }
  const lifts = liftTable(layer), x = layer.load.map((_, e) => e);
  const ticks = [0.0625, 0.25, 1, 4, 16];
  return draw(byId("together"), {
    data: [{
      type: "heatmap", x, y: x, z: lifts.map((row) => row.map((value) => (value === null ? null : Math.log2(value)))), customdata: lifts, zmin: -4, zmax: 4, hoverongaps: false,
      colorscale: [[0, "rgb(31,111,235)"], [0.5, "rgba(128,128,128,0.08)"], [1, "rgb(217,95,2)"]],
      colorbar: { tickvals: ticks.map(Math.log2), ticktext: ticks.map((t) => `${t}×`), thickness: 12 }, hovertemplate: "experts %{y} and %{x}: %{customdata:.2f} times as often as by chance<extra></extra>",
    }],
    layout: { title: "Chosen together, against chance", height: 340, xaxis: { title: { text: "expert", standoff: 4 } }, yaxis: { title: { text: "expert", standoff: 4 }, autorange: "reversed" } },
  });
}

function overview() {
  const x = lens.layers.map((layer) => layer.name), of = lens.layers.map((layer) => layer.measures);
  const line = (name, y, dash = "solid") => ({ type: "scatter", mode: "lines+markers", name, x, y, line: { dash }, connectgaps: false });
  const bits = (key) => of.map((m) => (m[key] ? m[key].bits : null));
  const figures = [
    ["What the choice depends on", "bits", [line("token", bits("token")), line("position", bits("position")), ...(of[0].domain ? [line("text", bits("domain"))] : [])]],
    ["How evenly experts are used", "", [line("evenness", of.map((m) => m.evenness)), line("load CV", of.map((m) => m.cv)), line("MaxVio", of.map((m) => m.max_vio))]],
    ["Shared experts and the bias", "share", [
      ...(of.some((m) => m.cosine !== null) ? [line("shared experts' share of the norms", of.map((m) => m.shared)), line("cosine, shared and routed", of.map((m) => m.cosine), "dot")] : []),
      ...(of.some((m) => m.moved_tokens !== null) ? [line("tokens moved by the bias", of.map((m) => m.moved_tokens))] : []),
    ]],
  ];
  if (lens.other) {
    const d = lens.layers.map((layer) => layer.other.drift);
    const name = { overlap: "same experts", same_first: "same first expert", variation: "loads: total variation", divergence: "loads: divergence (bits)", weight_change: "weights: difference" };
    figures.unshift(["Drift between the two models", "", Object.keys(name).map((key) => line(name[key], d.map((row) => row[key])))]);
    figures.push(["What the choice depends on, the other model", "bits", ["token", "position", ...(of[0].domain ? ["domain"] : [])].map((key) => line(key === "domain" ? "text" : key, lens.layers.map((layer) => layer.other.measures[key].bits)))]);
  }
  for (const [title, unit, data] of figures) {
    if (!data.length) continue;
    const box = make("div", { class: "chart" });
    byId("layers").append(box);
    draw(box, { data, layout: { title, height: 320, legend: BELOW, xaxis: { type: "category", title: { text: "layer", standoff: 4 } }, yaxis: { title: { text: unit }, rangemode: "tozero" } } });
  }
}

function measures() {
  const first = lens.layers[0].measures, other = lens.other;
  const bits = (m) => (m ? `${number(m.bits)}${m.share === null ? "" : ` (${percent(m.share, 0)})`}` : "–");
  const columns = [
    ["load CV", (m) => number(m.cv)], ["MaxVio", (m) => number(m.max_vio)], ["idle", (m) => m.dead],
    ["entropy, bits", (m) => `${number(m.entropy)} (${percent(m.evenness)})`],
    ["token, bits", (m) => bits(m.token)], ["position, bits", (m) => bits(m.position)],
    ...(first.domain ? [["text, bits", (m) => bits(m.domain)]] : []),
    ["shared", (m) => (m.cosine === null ? "–" : percent(m.shared))], ["cosine", (m) => number(m.cosine, 2)],
    ["moved tokens", (m) => percent(m.moved_tokens)], ["moved choices", (m) => percent(m.moved_choices)],
  ];
  const table = (of) => makeTable(["layer", ...columns.map(([name]) => name)], lens.layers.map((layer) => [layer.name, ...columns.map(([, cell]) => cell(of(layer)))]));
  const box = byId("measures");
  if (other) box.append(make("h3", {}, lens.model));
  box.append(table((layer) => layer.measures));
  if (other) {
    box.append(make("h3", {}, other), table((layer) => layer.other.measures), make("h3", {}, "Drift"));
    box.append(makeTable(["layer", "same experts", "same first", "total variation", "divergence, bits", "weight change"], lens.layers.map((layer) => {
      const d = layer.other.drift;
      return [layer.name, percent(d.overlap), percent(d.same_first), number(d.variation), number(d.divergence, 4), number(d.weight_change)];
    })));
  }
  const meanings = [
    ["load CV, MaxVio", "How uneven the load is: its standard deviation, and how far the busiest expert lies above the mean, both over the mean. 0 is even."],
    ["idle", "Experts that no token of these texts went to."],
    ["entropy", "How many bits it takes to say which expert was used; 100% is the most there can be, all used alike."],
    ["token, position, text", "Mutual information: how many bits knowing the token's id (its position in the window in bins that double; the text it is from) tells about the expert, above what shuffled tokens seem to tell. In brackets: of all that could be told. Near 0 the choice does not depend on it."],
    ["shared", "How much of what the layer adds the shared experts carry: their output's norm over the sum of its and the routed experts' norms, averaged over tokens."],
    ["cosine", "Whether the two pull the same way (1), have nothing to do with each other (0) or work against each other (−1)."],
    ["moved tokens, choices", "Tokens that would go to other experts without the balancing bias, and how many single choices that are."],
    ["chosen together (lift)", "How often two experts are chosen by the same token, over what their loads alone would give. 1× is chance."],
    ...(other ? [["same experts, same first", "The part of a token's experts that both models chose; tokens whose first choice is the same."],
      ["total variation, divergence", "How far the loads lie apart, whichever tokens make them up: 0 the same, 1 nothing in common (divergence: Jensen-Shannon)."],
      ["weight change", "Difference of the experts' weights over their sum, averaged over tokens: 0 the same, 1 nothing in common."]] : []),
  ];
  byId("meanings").append(...meanings.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
}

function showTip(token) {
  const layer = layerAt(now.layer), { choices } = layer, tip = byId("tip"), rows = [];
  const named = (of, at) => make("button", { type: "button", class: `e${of.indices[at]}`, "data-expert": of.indices[at] }, `expert ${of.indices[at]}`);
  const there = (of, at) => of.indices[at] !== NONE;
  for (let at = token * choices; at < (token + 1) * choices; at++) {
    const cells = there(layer, at) ? [named(layer, at), weightAt(layer, at).toPrecision(3)] : ["–", "–"];
    if (layer.other) cells.push(...(there(layer.other, at) ? [named(layer.other, at), weightAt(layer.other, at).toPrecision(3)] : ["–", "–"]));
    if (layer.segments > 1) cells.unshift(`part ${Math.floor(((at - token * choices) * layer.segments) / choices) + 1}`);
    rows.push(cells);
  }
  const head = [...(layer.segments > 1 ? [""] : []), lens.other ? "this model" : "chosen", "weight", ...(lens.other ? ["other model", "weight"] : [])];
  const notes = [];
  if (layer.indices[token * choices] === NONE) notes.push("No decision: this MTP module has no next token to look at.");
  else {
    if (layer.shared) notes.push(`shared experts: ${percent(layer.shared[token] / 255, 0)} of the norms`);
    if (layer.moved) notes.push(layer.moved[token] ? `the bias moved ${layer.moved[token]} of ${choices} choices` : "the bias changed nothing");
    const same = layer.other ? agreement(layer, token) : null;
    if (same !== null) notes.push(`${percent(same, 0)} of the choices are the other model's too`);
  }
  tip.replaceChildren(
    make("p", { class: "name", dir: "auto" }, lens.labels[lens.ids[token]]),
    make("p", { class: "dim" }, `id ${lens.ids[token]}, position ${lens.positions[token]} in its window, layer ${layer.name}`),
    ...(layer.indices[token * choices] === NONE ? [] : [makeTable(head, rows)]),
    ...notes.map((note) => make("p", { class: "dim" }, note)),
  );
  tip.hidden = false;
  tip.classList.toggle("kept", now.kept);
  const place = lens.spans[token].getClientRects()[0] ?? lens.spans[token].getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = place.bottom + 6, room = document.documentElement;
  tip.style.left = `${Math.max(8, Math.min(place.left, room.clientWidth - size.width - 8))}px`;
  tip.style.top = `${Math.max(8, below + size.height < room.clientHeight ? below : place.top - size.height - 6)}px`;
}

function hideTip() {
  if (now.kept) return;
  now.token = null;
  byId("tip").hidden = true;
}

// Makes a token the current one, its figures open until something else is clicked.
function keep(token) {
  if (lens.current !== undefined) lens.spans[lens.current].removeAttribute("aria-current");
  now.kept = token !== null;
  lens.current = token ?? undefined;
  if (token === null) return hideTip();
  now.token = token;
  lens.spans[token].setAttribute("aria-current", "true");
  lens.spans[token].scrollIntoView({ block: "nearest" });
  showTip(token);
}

function listen() {
  const text = byId("text"), tokenOf = (event) => event.target.closest?.(".t")?.token;
  lens.starts = new Int32Array(lens.count);
  lens.documents.forEach(([, start]) => lens.starts.fill(start, start));
  byId("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
  byId("colour").addEventListener("change", (event) => { now.colour = event.target.value; recolour(); });
  byId("choice").addEventListener("change", (event) => { now.choice = Number(event.target.value); recolour(); });
  byId("clear").addEventListener("click", () => select(null));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("legend").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) select(Number(button.dataset.expert));
  });
  byId("tip").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && Number(button.dataset.expert) !== now.expert) select(Number(button.dataset.expert));
  });
  text.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token === undefined || now.kept) return;
    now.token = token;
    showTip(token);
  });
  text.addEventListener("pointerleave", hideTip);
  text.addEventListener("scroll", () => (now.kept && now.token !== null ? showTip(now.token) : hideTip()));
  text.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token !== undefined) keep(now.kept && token === lens.current ? null : token);
  });
  document.addEventListener("click", (event) => {
    if (now.kept && !event.target.closest("#text, #tip, .contexts, #controls, #legend")) keep(null);
  });
  addEventListener("scroll", () => (now.kept ? showTip(now.token) : hideTip()));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (now.kept) keep(null);
    else if (now.expert !== null) select(null);
  });
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = lens.current ?? now.token, step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], layer = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (step !== undefined) keep(at === null || at === undefined ? 0 : Math.max(0, Math.min(lens.count - 1, at + step)));
    else if (layer !== undefined) setLayer(now.layer + layer);
    else if (event.key === "Home") keep(0);
    else if (event.key === "End") keep(lens.count - 1);
    else if (event.key === "Enter" && at !== null && at !== undefined) {
      const expert = layerAt(now.layer).indices[at * layerAt(now.layer).choices + now.choice];
      if (expert !== NONE) select(expert);
    } else return;
    event.preventDefault();
  });
}
