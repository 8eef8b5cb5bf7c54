"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (query, inside = document) => [...inside.querySelectorAll(query)];
const make = (name, attributes = {}, ...inside) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...inside);
  return element;
};

// ------------------------------------------------------------------- what a reader chose, kept over a renewal

const KEY = "ddsweep-report " + document.title;
let kept = {};
try { kept = JSON.parse(sessionStorage.getItem(KEY)) || {}; } catch { /* no storage for files here */ }
const state = { filters: {}, words: "", picked: data.picked, x: data.x, colour: data.colour, theme: "", renew: true, ...kept };
// Kept by name: of a sweep that runs, trials get other numbers.
const nameOf = (number) => `${data.trials[number].sweep}/${data.trials[number].id}`;
const numbers = new Map(data.trials.map((trial, number) => [nameOf(number), number]));
state.picked = new Set(kept.picked ? kept.picked.map((name) => numbers.get(name)).filter((one) => one >= 0) : data.picked);
const keep = () => {
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ ...state, picked: [...state.picked].map(nameOf), scroll: scrollY }));
  } catch { /* as above */ }
};

// ------------------------------------------------------------------------------------------ networks

const bytes = Uint8Array.from(atob(data.networks.values), (letter) => letter.charCodeAt(0));
const values = new Uint16Array(bytes.buffer);
function networkRows(numbers, every) {
  const { trial, step, start, seeds, last } = data.networks, rows = [];
  for (let place = 0; place < trial.length; place++) {
    if (!numbers.has(trial[place]) || (!every && !last[place])) continue;
    const own = data.networks.seedsets[seeds[place]];
    for (let i = 0; i < own.length; i++)
      rows.push({ trial: trial[place], step: step[place], seed: own[i], y: values[start[place] + i] / 100 });
  }
  return rows;
}
const networksOf = new Map();
data.networks.trial.forEach((number, place) => {
  if (data.networks.last[place]) networksOf.set(number, data.networks.seedsets[data.networks.seeds[place]].length);
});

// ------------------------------------------------------------------------------------------ filters

const axes = Object.fromEntries(data.axes.map((axis) => [axis.name, axis]));
const valueOf = (trial, axis) => (trial.values[axis] === undefined ? null : trial.values[axis]);
// What was chosen on an earlier page may be of a setting that does not vary any more.
if (!axes[state.x]) state.x = data.x;
if (!axes[state.colour]) state.colour = data.colour;
let shown = new Set();
function applyFilters() {
  const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
  shown = new Set();
  data.trials.forEach((trial, number) => {
    const text = `${trial.label} ${trial.state} ${trial.sweep}`.toLowerCase();
    const fits = Object.entries(state.filters).every(([axis, wanted]) => {
      const value = axis === "state" ? trial.state : valueOf(trial, axis);
      if (Array.isArray(wanted)) {
        const [low, high] = wanted;
        return (low === null || (value !== null && value >= low)) && (high === null || (value !== null && value <= high));
      }
      return String(value) === wanted;
    });
    if (fits && words.every((word) => text.includes(word))) shown.add(number);
  });
  for (const row of $("[data-trial]")) row.hidden = !shown.has(Number(row.dataset.trial));
  document.getElementById("shown").textContent = `${shown.size} of ${data.trials.length} trials shown`;
  keep();
  redraw();
}

function buildFilters() {
  const home = document.getElementById("filters");
  const states = [...new Set(data.trials.map((trial) => trial.state))];
  const choices = [...data.axes.map((axis) => [axis.name, axis.title]), ["state", "state"]];
  // What was chosen on an earlier page may be nothing that this one offers.
  const stays = new Set();
  for (const [name, title] of choices) {
    const found = new Set(data.trials.map((trial) => (name === "state" ? trial.state : valueOf(trial, name))));
    if (found.size < 2) continue;
    const numeric = [...found].every((value) => value === null || typeof value === "number");
    const list = found.size <= 40 && !(numeric && found.size > 12);
    const wanted = state.filters[name];
    const offered = list ? [...found].some((value) => String(value) === wanted) : numeric && Array.isArray(wanted);
    if (offered) stays.add(name);
    if (list) {
      const select = make("select", { id: `filter-${name}` }, make("option", { value: "" }, "all"));
      const sorted = [...found].sort((a, b) => (numeric ? a - b : String(a) < String(b) ? -1 : 1));
      for (const value of sorted) select.append(make("option", { value: String(value) }, value === null ? "–" : String(value)));
      if (offered) select.value = wanted;
      select.addEventListener("change", () => {
        if (select.value) state.filters[name] = select.value; else delete state.filters[name];
        applyFilters();
      });
      home.append(make("label", { for: select.id }, title, select));
    } else if (numeric) {
      const ends = ["from", "to"].map((word, place) => {
        const input = make("input", { type: "number", step: "any", "aria-label": `${title} ${word}`, placeholder: word });
        if (offered && wanted[place] !== null) input.value = wanted[place];
        return input;
      });
      const change = () => {
        const range = ends.map((input) => (input.value === "" ? null : Number(input.value)));
        if (range.every((end) => end === null)) delete state.filters[name]; else state.filters[name] = range;
        applyFilters();
      };
      for (const input of ends) input.addEventListener("change", change);
      home.append(make("fieldset", {}, make("legend", {}, title), ...ends));
    }
  }
  for (const name of Object.keys(state.filters)) if (!stays.has(name)) delete state.filters[name];
  const words = document.getElementById("words");
  words.value = state.words;
  words.addEventListener("input", () => { state.words = words.value; applyFilters(); });
  document.getElementById("reset").addEventListener("click", () => {
    state.filters = {}; state.words = words.value = "";
    for (const select of $("select", home)) select.value = "";
    for (const input of $("input", home)) input.value = "";
    applyFilters();
  });
}

// ------------------------------------------------------------------------------------------- tables

function sortable(table) {
  const heads = $("thead th", table), body = table.tBodies[0];
  heads.forEach((head) => {
    const button = make("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[head.cellIndex];
        if (cell.dataset.v === undefined) return cell.textContent;
        return cell.dataset.v === "" ? null : Number(cell.dataset.v);
      };
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

function pickable(table) {
  table.tHead.rows[0].prepend(make("th", { scope: "col" }, "pick"));
  for (const row of table.tBodies[0].rows) {
    const number = Number(row.dataset.trial);
    const box = make("input", { type: "checkbox", "aria-label": `Draw trial ${data.trials[number].id} by network` });
    box.checked = state.picked.has(number);
    box.addEventListener("change", () => {
      if (box.checked) state.picked.add(number); else state.picked.delete(number);
      keep(); redraw();
    });
    row.prepend(make("td", {}, box));
  }
}

// ------------------------------------------------------------------------------------------- charts

const MOST_POINTS = 6000, MANY = 150, ROW = 26;
let onPaper = false;
const isDark = () =>
  !onPaper && (state.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
// Light, on white, whatever the screen shows.
function paper(on) {
  onPaper = on;
  const root = document.documentElement;
  if (on) root.dataset.theme = "light"; else if (state.theme) root.dataset.theme = state.theme; else delete root.dataset.theme;
}

const colours = () => data.colours[isDark() ? "dark" : "light"];

function config() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), grid = style.getPropertyValue("--line").trim();
  const words = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    background: onPaper ? "white" : null,
    font: "system-ui, sans-serif",
    axis: { ...words, gridColor: grid, domainColor: grid, tickColor: grid },
    legend: words,
    view: { stroke: null },
  };
}

const scaleOf = (axis) => (axis.log ? { type: "log", nice: true } : { zero: false, nice: true });

// Another axis, or another colour, in all layers of a description.
function withAxes(spec, x, colour) {
  const copy = structuredClone(spec);
  for (const layer of [copy, ...(copy.layer || [])]) {
    const encoding = layer.encoding || {};
    if (x && encoding.x && encoding.x.field === "x") {
      encoding.x.type = x.kind; encoding.x.title = x.title;
      delete encoding.x.scale; delete encoding.x.axis;
      if (x.kind === "quantitative") { encoding.x.scale = scaleOf(x); delete encoding.xOffset; }
      else {
        encoding.x.axis = { labelAngle: 0, labelOverlap: true, labelLimit: 120 };
        encoding.xOffset = { field: "o", type: "quantitative", scale: { domain: [-1.2, 1.2] } };
      }
    }
    if (!colour && encoding.color && encoding.color.field === "c") encoding.color.scale = { range: colours() };
    if (colour && encoding.color && encoding.color.field === "c") {
      const base = { field: "c", title: colour.title };
      encoding.color = colour.kind === "quantitative"
        ? { ...base, type: "quantitative", scale: { scheme: "viridis", type: colour.log ? "log" : "linear" } }
        : { ...base, type: colour.kind === "ordinal" ? "ordinal" : "nominal", scale: { range: colours() },
            legend: { orient: "bottom", columns: 1, labelLimit: 600, symbolLimit: 20, symbolOpacity: 1 } };
    }
  }
  return copy;
}

function placesBy(axis) {
  const groups = new Map();
  for (const number of shown) {
    const key = String(valueOf(data.trials[number], axis));
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(number);
  }
  const widest = Math.max(1, ...[...groups.values()].map((group) => group.length)), places = new Map();
  for (const group of groups.values())
    group.forEach((number, place) => places.set(number, (2 * place - group.length + 1) / widest));
  return [places, widest];
}

function rowsOf(chart) {
  const picked = new Set([...state.picked].filter((number) => shown.has(number)));
  const which = { shown, picked }, found = {};
  for (const [name, dataset] of Object.entries(chart.datasets)) {
    const names = Object.keys(dataset.columns), wanted = which[dataset.which], rows = [];
    const length = names.length ? dataset.columns[names[0]].length : 0;
    for (let i = 0; i < length; i++) {
      if (wanted && !wanted.has(dataset.columns.trial[i])) continue;
      const row = {};
      for (const key of names) row[key] = dataset.columns[key][i];
      rows.push(row);
    }
    found[name] = rows;
  }
  if (chart.networks) {
    let count = 0;
    for (const number of shown) count += networksOf.get(number) || 0;
    const all = chart.networks === "last" && count <= MOST_POINTS;
    found.networks = networkRows(all ? shown : picked, chart.networks === "every");
  }
  const [places, widest] = chart.axes ? placesBy(state.x) : [new Map(), 1];
  for (const rows of Object.values(found))
    for (const row of rows) {
      if (row.trial === undefined) continue;
      const trial = data.trials[row.trial];
      row.label = trial.label;
      const colour = chart.colour ? valueOf(trial, state.colour) : trial.label;
      row.c = colour === null ? "–" : colour;
      if (chart.axes) {
        const along = valueOf(trial, state.x);
        row.x = along === null && axes[state.x].kind !== "quantitative" ? "–" : along;
        const jitter = row.seed === undefined || networksOf.get(row.trial) === 1 ? 0 : (((row.seed * 0.618034) % 1) - 0.5) * 1.2 / widest;
        row.o = places.get(row.trial) + jitter;
      }
    }
  return found;
}

// Of many trials smaller dots, and paler bars.
function crowded(spec) {
  for (const layer of spec.layer) {
    if (layer.mark.type === "point") Object.assign(layer.mark, { size: 14, opacity: 0.7 });
    if (layer.mark.type === "rule") layer.mark.opacity = 0.2;
  }
}

function heightIn(spec, datasets) {
  const first = spec.layer ? spec.layer[0] : spec;
  const field = (first.encoding || spec.encoding).y.field;
  return new Set(Object.values(datasets)[0].map((row) => row[field])).size;
}

const dirty = new Set();
async function draw(name) {
  dirty.delete(name);
  const chart = data.charts[name], figure = document.getElementById(`chart-${name}`), plot = $(".plot", figure)[0];
  const datasets = rowsOf(chart), rows = Object.values(datasets).flat().length;
  const empty = $(".empty", figure)[0];
  const main = Object.entries(chart.datasets).filter(([, dataset]) => dataset.which !== "all").map(([key]) => datasets[key]);
  const none = main.length ? main.every((found) => !found.length) : !rows;
  empty.hidden = !none;
  plot.hidden = none;
  // A scale of numbers has no place for "none".
  const without = new Set();
  for (const row of Object.values(datasets).flat()) {
    if (row.trial === undefined) continue;
    if (chart.axes && axes[state.x].kind === "quantitative" && typeof row.x !== "number") without.add(row.trial);
    if (chart.colour && axes[state.colour].kind === "quantitative" && typeof row.c !== "number") without.add(row.trial);
  }
  const left = $(".left", figure)[0];
  left.hidden = none || !without.size;
  left.textContent = `Not drawn: ${without.size} of these trials, without a number along x or for the colour.`;
  if (!none) {
    const spec = withAxes(chart.spec, chart.axes ? axes[state.x] : null, chart.colour ? axes[state.colour] : null);
    for (const [key, value] of Object.entries(datasets)) (spec.datasets ||= {})[key] = value;
    if (spec.layer) spec.layer = spec.layer.filter((layer) => datasets[(layer.data || spec.data).name].length);
    if (chart.axes && shown.size > MANY) crowded(spec);
    if (spec.height === undefined) spec.height = ROW * heightIn(spec, datasets);
    const result = await vegaEmbed(plot, spec, {
      actions: false, renderer: "canvas", config: config(), tooltip: { theme: isDark() ? "dark" : "light" },
    });
    if (figure.view) figure.view.finalize();
    figure.view = result.view;
    for (const canvas of $("canvas", plot)) canvas.setAttribute("aria-hidden", "true");
  }
  figure.dataset.rows = rows;
  figure.dataset.drawn = Number(figure.dataset.drawn || 0) + 1;
}

const visible = new Set();
let waiting = Promise.resolve();
// One after the other; what fails does not keep the next from being drawn.
const after = (work) => { waiting = waiting.then(work).catch((error) => console.error(error)); };
const request = (name) => after(() => (dirty.has(name) ? draw(name) : undefined));
function redraw() {
  for (const name of Object.keys(data.charts)) {
    dirty.add(name);
    if (visible.has(name)) request(name);
  }
}
function watchCharts() {
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const name = entry.target.id.replace("chart-", "");
      if (entry.isIntersecting) visible.add(name); else visible.delete(name);
      if (entry.isIntersecting && dirty.has(name)) request(name);
    }
  }, { rootMargin: "300px" });
  for (const figure of $("figure.chart")) observer.observe(figure);
  // A page is printed before charts could be drawn anew: those of a dark page are turned light by the style.
  addEventListener("beforeprint", () => {
    document.documentElement.classList.toggle("dark-charts", isDark());
    for (const name of dirty) request(name);
  });
  addEventListener("afterprint", () => document.documentElement.classList.remove("dark-charts"));
}

function buildCharts() {
  for (const [name, chart] of Object.entries(data.charts)) {
    const figure = document.getElementById(`chart-${name}`), home = $(".tools", figure)[0];
    const choose = (title, key, names) => {
      const select = make("select", { id: `${name}-${key}` });
      for (const axis of names) select.append(make("option", { value: axis }, axes[axis].title));
      select.value = state[key];
      select.addEventListener("change", () => {
        state[key] = select.value;
        for (const other of $(`select[id$="-${key}"]`)) other.value = select.value;
        keep(); redraw();
      });
      home.append(make("label", { for: select.id }, title, select));
    };
    const names = data.axes.map((axis) => axis.name);
    if (chart.axes) choose("along x", "x", names);
    if (chart.colour) choose("colour", "colour", names);
    for (const kind of ["svg", "png"]) {
      const button = make("button", { type: "button", "aria-label": `Save ${chart.title} as ${kind.toUpperCase()}` }, kind.toUpperCase());
      button.addEventListener("click", () => {
        after(async () => {
          if (!figure.view) return;
          paper(true);
          try {
            await draw(name);
            make("a", { href: await figure.view.toImageURL(kind, 2), download: `${name}.${kind}` }).click();
          } finally { paper(false); }
          await draw(name);
        });
      });
      home.append(button);
    }
  }
}

// ----------------------------------------------------------------------------- pictures, theme, renewal

function buildZoom() {
  const dialog = document.getElementById("zoom"), picture = $("img", dialog)[0];
  let width = 100;
  const resize = (factor) => { width = Math.min(1600, Math.max(50, width * factor)); picture.style.width = `${width}%`; };
  for (const button of $("button.zoom"))
    button.addEventListener("click", () => {
      const own = $("img", button)[0];
      picture.src = own.src; picture.alt = own.alt;
      width = 100; resize(1);
      dialog.showModal();
    });
  document.getElementById("larger").addEventListener("click", () => resize(1.5));
  document.getElementById("smaller").addEventListener("click", () => resize(1 / 1.5));
  document.getElementById("close").addEventListener("click", () => dialog.close());
}

function buildTheme() {
  const button = document.getElementById("theme");
  const apply = () => {
    if (state.theme && !onPaper) document.documentElement.dataset.theme = state.theme;
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => { state.theme = isDark() ? "light" : "dark"; apply(); keep(); redraw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { apply(); redraw(); });
  apply();
}

function buildRenewal() {
  if (!data.renew) return;
  const box = document.getElementById("renew");
  box.checked = state.renew;
  box.addEventListener("change", () => { state.renew = box.checked; keep(); });
  setInterval(() => { if (state.renew && !document.getElementById("zoom").open) { keep(); location.reload(); } }, data.renew * 1000);
}

document.documentElement.classList.add("alive");
for (const table of $("table")) sortable(table);
const trials = document.getElementById("all-trials");
if (trials) pickable(trials);
buildTheme(); buildFilters(); buildCharts(); buildZoom(); buildRenewal();
watchCharts(); applyFilters();
if (kept.scroll) scrollTo(0, kept.scroll);
document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
