"use strict";
/**
 * What the person has chosen, its text in the address (after the #), and the maps that follow from it.
 *
 * The query is a pixel of the finest grid among the layers; on a coarser one it is the pixel that covers it.
 */

const DEFAULTS = {
  run: 0,
  other: -1, // the run beside it; -1: none
  sides: "beside", // or difference
  image: 0, // a number, "average" or "own"
  query: null, // null: the middle
  layer: 0,
  head: 0,
  values: "probabilities", // or scores
  part: "total", // or position, content
  outlines: true,
  epoch: -1, // of the history; -1: the checkpoint
  sharpness: 0, // of the theorem, in powers of 2
  off: [], // heads that are switched off, as "layer:head"
  centers: {}, // of heads that were dragged, by "layer:head"
};

const state = structuredClone(DEFAULTS);
const live = { own: null, result: null }; // the person's picture, and what the network makes of the current one
let views = [];
let networks = [];

const view = () => views[state.run];
const compared = () => state.other >= 0 && state.other < views.length && state.other !== state.run;

/** Returns the text of the state: what differs from the defaults. */
function stateText() {
  const parts = Object.entries(state).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(DEFAULTS[name]));
  return parts.map(([name, value]) => `${name}=${encodeURIComponent(JSON.stringify(value))}`).join("&");
}

/** Takes the state from the text that `stateText` returned; what is not understood is left out. */
function readState(text) {
  Object.assign(state, structuredClone(DEFAULTS));
  for (const [name, value] of new URLSearchParams(text)) {
    if (!(name in DEFAULTS)) continue;
    try {
      state[name] = JSON.parse(value);
    } catch {
      continue;
    }
  }
  keepInRange();
}

const within = (value, low, high, otherwise) =>
  Number.isFinite(value) ? Math.min(Math.max(value, low), high) : otherwise;
const whole = (value, low, high, otherwise) => Math.round(within(value, low, high, otherwise));

/** Puts every choice into what the runs have, since an address may be of another page. */
function keepInRange() {
  state.run = whole(state.run, 0, views.length - 1, 0);
  state.other = whole(state.other, -1, views.length - 1, -1);
  if (state.sides !== "difference") state.sides = "beside";
  const { layers, images, history } = view();
  if (state.image !== "average" && !(state.image === "own" && live.own))
    state.image = whole(state.image, 0, (imageCount(view()) || 1) - 1, 0);
  if (state.image === "average" && !images) state.image = 0;
  if (state.values !== "scores") state.values = "probabilities";
  if (!hasContent(view()) || !["position", "content"].includes(state.part)) state.part = "total";
  state.outlines = Boolean(state.outlines);
  state.epoch = history ? whole(state.epoch, -1, historyLength(history) - 2, -1) : -1;
  state.sharpness = within(state.sharpness, 0, 12, 0);
  state.layer = whole(state.layer, 0, Math.max(layers.length - 1, 0), 0);
  state.head = layers.length ? whole(state.head, 0, headsOf(layers[state.layer].parameters) - 1, 0) : 0;
  const [height, width] = finestGrid();
  const asked = Array.isArray(state.query) ? state.query : [];
  state.query = [whole(asked[0], 0, height - 1, height >> 1), whole(asked[1], 0, width - 1, width >> 1)];
  const exists = (name) => {
    const [layer, head] = String(name).split(":").map(Number);
    return layer in layers && head >= 0 && head < headsOf(layers[layer].parameters);
  };
  state.off = (Array.isArray(state.off) ? state.off : []).filter(exists);
  const moved = Object.entries(state.centers || {});
  state.centers = Object.fromEntries(
    moved.filter(([name, center]) => exists(name) && Array.isArray(center) && center.every(Number.isFinite)),
  );
}

const hasContent = ({ layers }) => layers.some(({ parameters }) => parameters.content);
const historyLength = (history) => (history.epoch || history.step).length;

/** Returns how many images the run's maps are of. */
function imageCount({ images, layers }) {
  return images ? images.shape[0] : layers[0].parameters.maps.shape[0];
}

/** Returns rows and columns of the finest grid, of both runs where there are two; without layers, of the image. */
function finestGrid() {
  const layers = [...view().layers, ...(compared() ? views[state.other].layers : [])];
  if (!layers.length) return view().images.shape.slice(1, 3);
  return layers.map(({ grid }) => grid).reduce((a, b) => (a[0] >= b[0] ? a : b));
}

/** Returns the query on a layer's grid, without its padding. */
function queryOn({ grid }) {
  const finest = finestGrid();
  return state.query.map((at, axis) => Math.floor(((at + 0.5) * grid[axis]) / finest[axis]));
}

/** Returns the pixels of the current picture, of a run that has images; null otherwise. */
function picture({ images } = view()) {
  if (!images) return null;
  const shape = images.shape.slice(1);
  if (state.image === "own") return live.own;
  const size = shape[0] * shape[1] * shape[2];
  if (state.image !== "average") return images.subarray(state.image * size, (state.image + 1) * size);
  const mean = new Float32Array(size);
  for (let n = 0; n < images.length; n++) mean[n % size] += images[n] / images.shape[0];
  return Uint8Array.from(mean);
}

/** Returns the parameters of a layer as they are to be shown: at an epoch of training, or with dragged centers. */
function currentParameters(run, n) {
  const { layers, history } = views[run];
  const { parameters, number } = layers[n];
  if (state.epoch >= 0 && history) return pastParameters(history, number, parameters) || parameters;
  const moved = Object.entries(state.centers).filter(([name]) => name.startsWith(`${n}:`));
  if (run !== state.run || !moved.length) return parameters;
  const part = parameters.position || parameters;
  const centers = Float32Array.from(part.centers);
  centers.shape = part.centers.shape;
  for (const [name, center] of moved) centers.set(center, 2 * Number(name.split(":")[1]));
  return parameters.position ? { ...parameters, position: { ...part, centers } } : { ...part, centers };
}

/** Returns what position alone scored at the epoch that is chosen; null where the history has no such scores. */
function pastParameters(history, number, parameters) {
  const heads = headsOf(parameters);
  const at = (array) => {
    const size = array.shape.slice(2).reduce((a, b) => a * b, 1);
    const start = (Math.min(state.epoch, array.shape[0] - 1) * array.shape[1] + number) * size;
    const values = array.subarray(start, start + (size / array.shape[2]) * heads);
    values.shape = [heads, ...array.shape.slice(3)];
    return values;
  };
  if (history.precision) return { encoding: "gaussian", centers: at(history.center), precisions: at(history.precision) };
  if (!history.row_scores) return null;
  return { encoding: "learned", row_scores: at(history.row_scores), column_scores: at(history.column_scores) };
}

/** Returns mean and covariance of a head's shift at the epoch that is chosen, where the history has just these. */
function pastOutline({ history, layers }, n, head) {
  if (state.epoch < 0 || !history || !history.mean_shift) return null;
  const start = (state.epoch * history.mean_shift.shape[1] + layers[n].number) * history.mean_shift.shape[2] + head;
  return {
    center: Array.from(history.mean_shift.subarray(2 * start, 2 * start + 2)),
    covariance: Array.from(history.covariance.subarray(4 * start, 4 * start + 4)),
  };
}

/** Returns what a layer sees of the current picture: one entry for each image that maps are averaged over. */
function inputs(run, n) {
  const { layers, images } = views[run];
  const { features, parameters } = layers[n];
  if (parameters.encoding === "maps") {
    if (state.image === "average") return Array.from({ length: imageCount(views[run]) }, (_, image) => ({ image }));
    return [{ image: state.image === "own" ? 0 : state.image }];
  }
  if (!features) return [{}];
  if (run === state.run && live.result) return [{ x: live.result.seen[n] }];
  const size = features.length / features.shape[0];
  const of = (image) => ({ x: features.subarray(image * size, (image + 1) * size) });
  if (state.image === "own") return [of(0)];
  return state.image === "average" ? Array.from({ length: images.shape[0] }, (_, image) => of(image)) : [of(state.image)];
}

/**
 * Returns one head's map at the query: `P`, `values` (what is to be drawn), `grid`, `query`, `outline`, `off`.
 *
 * Probabilities of padding, of which there are no pixels to draw, are left out of P.
 */
function headMap(run, n, head, { parameters = currentParameters(run, n), sharpness = 1 } = {}) {
  const layer = views[run].layers[n];
  const { grid, padding } = layer;
  const query = queryOn(layer);
  const padded = [grid[0] + 2 * padding, grid[1] + 2 * padding];
  const at = [query[0] + padding, query[1] + padding];
  const seen = inputs(run, n);
  const averaged = (of) => {
    const values = mean(seen.map((input) => of(parameters, head, at, padded, { ...input, part: state.part, sharpness })));
    return padding ? cropped(values, padded, padding) : values;
  };
  const P = averaged(probabilities);
  const map = { P, grid, query, values: P, off: run === state.run && state.off.includes(`${n}:${head}`) };
  if (state.values === "scores") map.values = averaged(scores);
  if (state.outlines) map.outline = pastOutline(views[run], n, head) || outlineOf(parameters, head, map);
  return map;
}

function mean(arrays) {
  if (arrays.length === 1) return arrays[0];
  return arrays[0].map((_, k) => arrays.reduce((sum, array) => sum + array[k], 0) / arrays.length);
}

function cropped(P, [height, width], padding) {
  const result = [];
  for (let k = padding; k < height - padding; k++) result.push(...P.subarray(k * width + padding, (k + 1) * width - padding));
  return Float32Array.from(result);
}

/** Returns center and covariance to draw: of the Gaussian that the head is, or else of what it attends to. */
function outlineOf(parameters, head, { P, query, grid }) {
  const gaussian = state.part === "content" ? null : gaussianOf(parameters, head);
  if (gaussian) return { center: gaussian.center, covariance: inverse(gaussian.precision) };
  const { mean, covariance } = measures(P, query, grid);
  return { center: mean, covariance };
}

/** Returns the maps of all heads of a run, by layer. */
function allMaps(run) {
  return views[run].layers.map((layer, n) => {
    const parameters = currentParameters(run, n);
    return Array.from({ length: headsOf(parameters) }, (_, head) => headMap(run, n, head, { parameters }));
  });
}

/** Returns the maps of the first run minus those of the second, where both have the head on the same grid. */
function differences(first, second) {
  return first.map((heads, n) =>
    heads.map((map, head) => {
      const other = second[n]?.[head];
      if (!other || String(other.grid) !== String(map.grid)) return null;
      const values = map.values.map((value, k) => value - other.values[k]);
      return { values, grid: map.grid, query: map.query, signed: true };
    }),
  );
}

/** Returns the probabilities of the classes as they are now: the network's, or those that came with the page. */
function prediction() {
  const { probabilities: shipped, classes } = view();
  if (live.result) return softmax(live.result.logits);
  if (!shipped || !Number.isInteger(state.image)) return null;
  return shipped.subarray(state.image * classes.length, (state.image + 1) * classes.length);
}
