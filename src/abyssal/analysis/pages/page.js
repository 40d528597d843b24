"use strict";
// What every page shares: unpacking what lies in it, making elements, drawing charts. The page's own script has show(data).

async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// make("td", {class: "dim"}, "text", node, …): children that are no nodes become text, never markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function makeTable(head, rows) {
  const line = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, cell instanceof Node ? cell : String(cell))));
  return make("table", {}, make("thead", {}, line(head, "th")), make("tbody", {}, ...rows.map((row) => line(row, "td"))));
}

function styled(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Labels of charts may be given HTML by Plotly; text of users must go through this before it becomes one.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

const drawn = new Map(); // element -> figure, so that a change between light and dark draws anew

// figure: {data, layout} as Plotly takes them. Colours, fonts and margins are the page's own. Zoom survives new data.
function draw(element, figure) {
  const axis = { gridcolor: styled("--line"), zerolinecolor: styled("--line"), linecolor: styled("--line"), automargin: true };
  const layout = {
    height: 280, margin: { l: 48, r: 12, t: 36, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: styled("--ink") }, uirevision: "kept", hovermode: "closest",
    legend: { orientation: "h", y: -0.2 }, ...figure.layout,
  };
  for (const name of ["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key))]) {
    layout[name] = { ...axis, ...layout[name] };
  }
  if (typeof layout.title === "string") layout.title = { text: layout.title };
  layout.title = { x: 0.02, font: { size: 14 }, ...layout.title };
  drawn.set(element, figure);
  const hovers = matchMedia("(hover: hover)").matches; // on a touch screen the buttons would always cover the title
  const buttons = { displaylogo: false, displayModeBar: hovers ? "hover" : false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  return Plotly.react(element, figure.data, layout, { responsive: true, ...buttons });
}

function fail(error) {
  document.getElementById("problem").textContent = `This page could not be shown: ${error.message ?? error}`;
  throw error;
}

async function start() {
  try {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser is from before 2023; a newer one can open it");
    const [library, data] = await Promise.all([unpack("library"), unpack("data")]);
    document.head.append(make("script", {}, library));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const [element, figure] of drawn) if (element.isConnected) draw(element, figure);
    });
    await show(JSON.parse(data));
    document.body.dataset.ready = "yes"; // tests and screenshots wait for this
  } catch (error) {
    fail(error);
  }
}
