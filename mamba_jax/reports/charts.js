// Draws the curves of a page as SVG, as wide as the page allows, and shows values at the pointer.
'use strict';
{
const data = JSON.parse(document.getElementById('data').textContent);
const NS = 'http://www.w3.org/2000/svg';
const COLOURS = 8;
const TOP = 16, BOTTOM = 22, RIGHT = 12, TEXT = 7;   // pixels; TEXT: width of a digit

const view = { part: 1, tokens: false };   // the last share of the run that is shown; the x axis

function make(name, attributes, parent, text) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function element(name, attributes, parent, text) {
  const node = Object.assign(document.createElement(name), attributes);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// --- numbers -------------------------------------------------------------------------------------

function words(value, digits = 5) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';               // −0 too
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e15) {
    return value.toExponential(digits - 1).replace(/\.?0+e/, 'e').replace('e+', 'e').replace('-', '−');
  }
  const places = size >= 1 ? Math.max(0, digits - 1 - Math.floor(Math.log10(size))) : digits;
  return value.toLocaleString('en-US', { maximumFractionDigits: places }).replace('-', '−');
}
function brief(value) {                      // on an axis
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e4, 'k']]) {
    if (size >= limit) return words(value / (letter === 'k' ? 1e3 : limit), 4) + letter;
  }
  return words(value, 4);
}
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough * 0.999) || rough;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return niceTicks(low, high, count).filter(t => t > 0);
  const ticks = [], every = Math.max(1, Math.ceil(decades / count));
  const within = decades > count * 0.6 ? [1] : decades > 1.7 ? [1, 3] : [1, 2, 5];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += every) {
    for (const m of within) {
      const tick = m * 10 ** e;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}
function unitOf(chart, greatest) {           // what a value is divided by, and the unit's name
  if (chart.unit === 'share') return [0.01, '%'];
  if (chart.unit !== 'bytes') return [1, chart.unit];
  return greatest >= 2 ** 30 ? [2 ** 30, 'GiB'] : [2 ** 20, 'MiB'];
}

// --- places --------------------------------------------------------------------------------------

function across(curve, step) {               // the x of a step of this curve
  if (!view.tokens) return step;
  const bends = data.tokens[curve.run];
  let bend = bends[0];
  for (const one of bends) if (one[0] <= step) bend = one;
  return bend[1] + (step - bend[0]) * bend[2];
}
function lay(chart) {                        // the curves and the ranges of both axes
  const shown = chart.curves.filter((_, i) => !chart.hidden.has(i) &&
    !(view.tokens && !data.tokens[chart.curves[i].run]));
  let [first, last] = view.tokens ? data.token_span : data.span;
  if (view.part < 1) first = last - (last - first) * view.part;
  let low = Infinity, high = -Infinity;
  const fits = value => value !== null && (!chart.log || value > 0);
  for (const curve of shown) {
    curve.x.forEach((step, i) => {
      const x = across(curve, step);
      if (x < first || x > last) return;
      for (const value of curve.low ? [curve.low[i], curve.high[i]] : [curve.y[i]]) {
        if (fits(value)) { low = Math.min(low, value); high = Math.max(high, value); }
      }
    });
  }
  if (!isFinite(low)) [low, high] = chart.log ? [0.1, 1] : [0, 1];
  let above = null;                          // the highest value, if it is above the axis
  if (chart.robust && !chart.log) {
    const top = Math.max(...shown.map(curve => usualTop(curve, first, last)));
    if (isFinite(top) && high > top + 0.3 * (top - low)) {
      above = highest(shown, first, last);
      high = top;
    }
  }
  const [scale, unit] = unitOf(chart, high);
  low /= scale; high /= scale;
  if (chart.unit === 'bytes' && !chart.log) low = 0;
  if (chart.unit === 'share' && !chart.log) { low = 0; high = Math.max(high, 1); }
  if (low === high) [low, high] = chart.log ? [low / 2, high * 2]
    : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  else if (chart.log) { const pad = (high / low) ** 0.04; low /= pad; high *= pad; }
  else { const pad = (high - low) * 0.05; low = low === 0 ? 0 : low - pad; high += pad; }
  return { shown, first, last, low, high, scale, unit, fits, above };
}
function usualTop(curve, first, last) {      // the maximum of the shown values, a few outliers excluded
  const values = (curve.high || curve.y).filter((value, i) => value !== null &&
    across(curve, curve.x[i]) >= first && across(curve, curve.x[i]) <= last);
  const inOrder = of => [...of].sort((a, b) => a - b);
  const sorted = inOrder(values);
  if (sorted.length < 20) return sorted.at(-1) ?? -Infinity;
  const start = view.part === 1 ? inOrder(values.slice(0, 5))[2] : -Infinity;
  return Math.max(sorted[Math.floor(0.98 * (sorted.length - 1))], start);
}
function highest(curves, first, last) {      // the maximum of the shown values, and its step
  let found = [-Infinity, 0];
  for (const curve of curves) (curve.high || curve.y).forEach((value, i) => {
    const x = across(curve, curve.x[i]);
    if (value > found[0] && x >= first && x <= last) found = [value, curve.x[i], x];
  });
  return found;
}
function colour(curve) {
  return curve.share === undefined ? `var(--c${curve.colour % COLOURS})`
    : `hsl(${Math.round(232 - 205 * curve.share)} 68% var(--layer))`;
}
const dash = curve => ['', '7 4', '2 3', '9 3 2 3'][Math.floor((curve.colour || 0) / COLOURS) % 4];

// --- drawing -------------------------------------------------------------------------------------

let clips = 0;
function draw(figure, chart) {
  const plot = figure.querySelector('.plot');
  plot.replaceChildren();
  const width = Math.max(200, plot.clientWidth), height = width < 420 ? 200 : 230;
  const at = lay(chart), inner = height - TOP - BOTTOM;
  const yTicks = (chart.log ? logTicks : niceTicks)(at.low, at.high, 4);
  const left = 10 + TEXT * Math.max(3, ...yTicks.map(t => brief(t).length));
  const span = width - left - RIGHT;
  const X = x => left + span * (x - at.first) / (at.last - at.first);
  const place = chart.log ? Math.log : Number;
  const Y = value => TOP + inner * (1 - (place(value / at.scale) - place(at.low)) /
    (place(at.high) - place(at.low)));
  figure.querySelector('.unit').textContent = at.unit;
  const svg = make('svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': chart.title }, plot);
  const clip = `clip${clips++}`;
  const ceiling = at.above ? TOP - 2 : 0;     // below the label of the value above the axis
  make('rect', { x: left - 4, y: ceiling, width: span + 8, height: TOP + inner + 2 - ceiling },
    make('clipPath', { id: clip }, svg));

  for (const tick of yTicks) {
    const y = Y(tick * at.scale);
    make('line', { class: 'grid', x1: left, x2: left + span, y1: y, y2: y }, svg);
    make('text', { class: 'y', x: left - 6, y: y + 4 }, svg, brief(tick));
  }
  let free = -Infinity;                      // where the next label may begin
  for (const tick of niceTicks(at.first, at.last, Math.floor(span / 80))) {
    if (!view.tokens && tick % 1) continue;
    const label = brief(tick), half = label.length * TEXT / 2;
    const middle = Math.min(Math.max(X(tick), half), width - half - 1);
    make('line', { class: 'tick', x1: X(tick), x2: X(tick), y1: TOP + inner, y2: TOP + inner + 4 }, svg);
    if (middle - half < free) continue;
    make('text', { class: 'x', x: middle, y: height - 5 }, svg, label);
    free = middle + half + 8;
  }
  make('line', { class: 'base', x1: left, x2: left + span, y1: TOP + inner, y2: TOP + inner }, svg);

  const body = make('g', { 'clip-path': `url(#${clip})` }, svg);
  if (data.marks) {
    for (const [step] of data.marks.resumed) {
      if (step < at.first) continue;
      make('line', { class: 'resumed', x1: X(step), x2: X(step), y1: TOP - 6, y2: TOP + inner }, body);
    }
    if (chart.skips) for (const [step] of data.marks.skipped) {
      if (step < at.first) continue;
      const x = X(step), y = TOP + inner;
      make('line', { class: 'skipped', x1: x, x2: x, y1: y - 7, y2: y }, body);
    }
  }
  for (const curve of at.shown) {
    const ink = colour(curve), runs = [];
    let run = null;
    curve.x.forEach((step, i) => {
      if (!at.fits(curve.y[i])) { run = null; return; }
      if (!run) runs.push(run = []);
      run.push(i);
    });
    const x = i => X(across(curve, curve.x[i])).toFixed(1);
    for (const points of runs) {
      if (curve.low) {
        const floor = i => Y(at.fits(curve.low[i]) ? curve.low[i] : at.low * at.scale).toFixed(1);
        const up = points.map(i => `${x(i)} ${Y(curve.high[i]).toFixed(1)}`);
        const down = points.map(i => `${x(i)} ${floor(i)}`).reverse();
        make('path', { class: chart.by_layer ? 'band many' : 'band', fill: ink, stroke: ink,
          d: `M${up.concat(down).join('L')}Z` }, body);
      }
      if (points.length > 1) {
        const d = points.map(i => `${x(i)} ${Y(curve.y[i]).toFixed(1)}`).join('L');
        make('path', { class: `curve ${curve.look}`, stroke: ink, d: `M${d}` }, body)
          .style.strokeDasharray = dash(curve);
      }
      if (curve.look === 'dots' || points.length === 1) for (const i of points) {
        make('circle', { cx: x(i), cy: Y(curve.y[i]).toFixed(1), r: points.length > 60 ? 1.5 : 3,
          fill: ink }, body);
      }
    }
    for (const [step] of curve.gaps || []) {
      const gap = X(across(curve, step)), y = TOP - 6;
      if (gap >= left - 4) {
        make('path', { class: 'gap', d: `M${gap - 4} ${y - 4}l8 8m0 -8l-8 8` }, body);
      }
    }
  }
  if (at.above) {
    const [value, step, x] = at.above, label = `▲ ${words(value / at.scale, 4)} at step ${words(step, 9)}`;
    const half = label.length * TEXT / 2;
    make('text', { class: 'above', y: 11,
      x: Math.min(Math.max(X(x), half), width - half - 1) }, svg, label)
      .append(make('title', {}, null, 'above the range of this axis; press log to see it'));
  }
  point(plot, svg, chart, at, { X, Y, left, span, inner, width });
}

// --- reading values ------------------------------------------------------------------------------

function nearest(curve, x) {
  let low = 0, high = curve.x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (across(curve, curve.x[middle]) < x) low = middle + 1; else high = middle;
  }
  const before = Math.max(0, low - 1);
  return Math.abs(across(curve, curve.x[before]) - x) < Math.abs(across(curve, curve.x[low]) - x)
    ? before : low;
}
function gapIn(curve, i) {
  const from = curve.from ? curve.from[i] : curve.x[i];
  return (curve.gaps || []).find(([step]) => step >= from && step <= curve.x[i]);
}
function point(plot, svg, chart, at, { X, Y, left, span, inner, width }) {
  const tip = element('div', { className: 'tip', hidden: true }, plot);
  const cross = make('g', { class: 'cross', visibility: 'hidden' }, svg);
  const hide = () => { tip.hidden = true; cross.setAttribute('visibility', 'hidden'); };
  const show = event => {
    const box = svg.getBoundingClientRect();
    const mouse = (event.clientX - box.left) * width / box.width;
    const x = at.first + (Math.min(Math.max(mouse, left), left + span) - left) / span *
      (at.last - at.first);
    const curves = at.shown.filter(curve => curve.x.length);
    if (!curves.length) return;
    const found = curves.map(curve => [curve, nearest(curve, x)]);
    const distance = ([curve, i]) => Math.abs(across(curve, curve.x[i]) - x);
    const [main, place] = found.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const step = main.x[place];
    cross.replaceChildren();
    make('line', { x1: X(across(main, step)), x2: X(across(main, step)), y1: TOP, y2: TOP + inner }, cross);
    tip.replaceChildren();
    const from = main.from && main.from[place] < step ? `${words(main.from[place], 9)}–` : '';
    const where = view.tokens ? `${words(across(main, step), 4)} tokens` : `step ${from}${words(step, 9)}`;
    element('b', {}, tip, where);
    const rows = element('div', { className: found.length > 8 ? 'rows many' : 'rows' }, tip);
    for (const [curve, i] of found) {
      const off = Math.abs(across(curve, curve.x[i]) - across(main, step));
      if (off > (at.last - at.first) * 0.05) continue;   // such as a run that has ended
      const row = element('div', {}, rows);
      element('i', {}, row).style.background = colour(curve);
      element('span', {}, row, `${curve.name} `);
      const unit = at.unit === '%' ? ' %' : '';
      const value = curve.y[i] === null ? '' : words(curve.y[i] / at.scale) + unit;
      const range = curve.low && curve.y[i] !== null && found.length <= 8
        ? ` (${words(curve.low[i] / at.scale, 4)} … ${words(curve.high[i] / at.scale, 4)})` : '';
      const gap = gapIn(curve, i);
      const bad = gap ? ` ${gap[1] > 1 ? `${gap[1]} × ` : ''}${gap[2]}` : '';
      const other = !view.tokens && curve.look === 'dots' && curve.x[i] !== step
        ? ` at ${words(curve.x[i], 9)}` : '';
      element('span', { className: 'value' }, row, `${value}${range}${bad}${other}`);
      if (at.fits(curve.y[i])) {
        make('circle', { cx: X(across(curve, curve.x[i])), cy: Y(curve.y[i]), r: 3.5,
          fill: colour(curve) }, cross);
      }
    }
    cross.setAttribute('visibility', 'visible');
    tip.hidden = false;
    const right = X(across(main, step)) + 12 + tip.offsetWidth < width;
    tip.style.left = `${Math.max(0, Math.min(width - tip.offsetWidth,
      X(across(main, step)) + (right ? 12 : -12 - tip.offsetWidth)))}px`;
  };
  svg.addEventListener('pointermove', show);
  svg.addEventListener('pointerdown', show);
  svg.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') hide(); });
}

// --- controls ------------------------------------------------------------------------------------

function keys(figure, chart, redraw) {
  const legend = figure.querySelector('.legend');
  if (chart.by_layer && chart.curves.length > 8) {
    const ramp = [0, 0.25, 0.5, 0.75, 1].map(share => colour({ share })).join(',');
    element('span', {}, legend, chart.curves[0].name);
    element('i', { className: 'ramp' }, legend).style.background = `linear-gradient(90deg,${ramp})`;
    element('span', {}, legend, chart.curves.at(-1).name);
    return;
  }
  if (chart.curves.length < 2 && !data.tokens) return;   // one curve of one run: the title is enough
  chart.curves.forEach((curve, i) => {
    const key = element('button', { type: 'button', title: 'show or hide' }, legend);
    key.setAttribute('aria-pressed', true);
    const mark = element('i', { className: curve.look }, key);
    mark.style.color = colour(curve);
    if (dash(curve)) mark.classList.add('dashed');
    key.append(curve.name);
    key.addEventListener('click', () => {
      if (!chart.hidden.delete(i)) chart.hidden.add(i);
      key.setAttribute('aria-pressed', !chart.hidden.has(i));
      redraw();
    });
  });
}

const drawn = data.charts.map(chart => {
  const figure = document.getElementById(`chart-${chart.key}`);
  chart.hidden = new Set();
  const redraw = () => draw(figure, chart);
  const log = figure.querySelector('.log');
  log.hidden = !chart.curves.some(curve => curve.y.some(value => value > 0));
  log.addEventListener('click', () => {
    chart.log = !chart.log;
    log.setAttribute('aria-pressed', chart.log);
    redraw();
  });
  keys(figure, chart, redraw);
  return redraw;
});
const all = () => drawn.forEach(redraw => redraw());
for (const group of document.querySelectorAll('.choice')) {
  group.addEventListener('click', event => {
    const button = event.target.closest('button');
    if (!button) return;
    for (const other of group.querySelectorAll('button')) {
      other.setAttribute('aria-pressed', other === button);
    }
    if (button.dataset.part) view.part = Number(button.dataset.part);
    if (button.dataset.axis) view.tokens = button.dataset.axis === 'tokens';
    all();
  });
}
all();
let room = document.documentElement.clientWidth;
addEventListener('resize', () => {
  if (room !== document.documentElement.clientWidth) {
    room = document.documentElement.clientWidth;
    all();
  }
});
}
