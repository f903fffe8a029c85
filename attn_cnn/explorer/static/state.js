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
  epoch: -1, // a place in the history; -1: the checkpoint
  sharpness: 0, // of the theorem, in powers of 2
  off: [], // heads that are switched off, as "layer:head"
  centers: {}, // of heads that were dragged, by "layer:head"
};

const state = structuredClone(DEFAULTS);
const live = {
  own: null, // the person's picture: pixels, with a `shape` and a `version`
  answers: [], // by run: what its network made of the picture, and the question that this answers
};
let views = [];
let networks = [];

const view = () => views[state.run];
const compared = () => state.other >= 0 && state.other < views.length && state.other !== state.run;

/** Returns the text of the state: what differs from the defaults. */
function stateText() {
  const parts = Object.entries(state).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(DEFAULTS[name]));
  return parts.map(([name, value]) => `${name}=${encodeURIComponent(JSON.stringify(value))}`).join("&");
}

/** Whether the page has an address of its own; embedded in a notebook it has none. */
const hasAddress = location.protocol !== "about:";

/** Puts the state into the page's address. */
function showAddress() {
  if (hasAddress) history.replaceState(null, "", `#${stateText()}`);
}

/** Takes the state from the text that `stateText` returned; what is not understood is left out. */
function readState(text) {
  Object.assign(state, structuredClone(DEFAULTS));
  for (const [name, value] of new URLSearchParams(text)) {
    if (!Object.hasOwn(DEFAULTS, name)) continue;
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
  const { layers, images } = view();
  if (state.image !== "average" && !(state.image === "own" && live.own))
    state.image = whole(state.image, 0, (imageCount(view()) || 1) - 1, 0);
  if (state.image === "average" && !images) state.image = 0;
  if (state.values !== "scores") state.values = "probabilities";
  if (!hasContent(view()) || !["position", "content"].includes(state.part)) state.part = "total";
  state.outlines = Boolean(state.outlines);
  state.epoch = whole(state.epoch, -1, places(view()) - 2, -1);
  state.sharpness = within(state.sharpness, 0, 12, 0);
  state.layer = whole(state.layer, 0, Math.max(layers.length - 1, 0), 0);
  state.head = layers.length ? whole(state.head, 0, headsOf(layers[state.layer].parameters) - 1, 0) : 0;
  const [height, width] = finestGrid();
  const asked = Array.isArray(state.query) ? state.query : [];
  state.query = [whole(asked[0], 0, height - 1, height >> 1), whole(asked[1], 0, width - 1, width >> 1)];
  const off = Array.isArray(state.off) ? state.off : [];
  state.off = [...new Set(off.map(String))].filter(headNamed);
  state.centers = Object.fromEntries(Object.entries(state.centers || {}).filter(([name, center]) => canLie(name, center)));
}

/** Returns the parameters and the number of the head called "layer:head"; null if there is none. */
function headNamed(name) {
  const [, n, head] = /^(0|[1-9]\d*):(0|[1-9]\d*)$/.exec(name) || [];
  const parameters = view().layers[n]?.parameters;
  return parameters && Number(head) < headsOf(parameters) ? { parameters, head: Number(head) } : null;
}

function canLie(name, center) {
  const found = headNamed(name);
  const two = Array.isArray(center) && center.length === 2 && center.every(Number.isFinite);
  return found && two && gaussianOf(found.parameters, found.head) !== null;
}

const hasContent = ({ layers }) => layers.some(({ parameters }) => parameters.content);

/** Returns whether the history has all that the page shows of heads: of heads that see the image it has no maps. */
const keepsMaps = (run) => !run.history.mean_shift && !hasContent(run);

/** Returns how many places the history has: its epochs, and the checkpoint where none of them shows the same. */
function places(run) {
  if (!run.history) return 1;
  const { step } = run.history;
  return step.length + (keepsMaps(run) && step[step.length - 1] === run.step ? 0 : 1);
}

/** Returns whether nothing is known of a run's heads, at the epoch that is chosen, but moments over images and queries. */
const onlyMoments = (run) => isPast(run) && Boolean(views[run].history.mean_shift);

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

/** Returns the pixels of a run's picture that is chosen; null where it has none such. */
function picture(run = state.run, image = state.image) {
  const { images } = views[run];
  if (!images) return null;
  const shape = images.shape.slice(1);
  if (image === "own") return live.own && String(live.own.shape) === String(shape) ? live.own : null;
  const size = shape[0] * shape[1] * shape[2];
  if (image !== "average") return image < images.shape[0] ? images.subarray(image * size, (image + 1) * size) : null;
  const mean = new Float32Array(size);
  for (let n = 0; n < images.length; n++) mean[n % size] += images[n] / images.shape[0];
  return Uint8Array.from(mean);
}

/** Returns what a run's network is asked: the picture, and which heads are not as they were trained. */
function question(run) {
  const touched = run === state.run ? [state.off, state.centers] : [[], {}];
  return JSON.stringify([state.image, state.image === "own" && live.own.version, ...touched]);
}

/** Returns what a run's network made of what is asked now; null where it has not been computed. */
const answer = (run) => (live.answers[run]?.question === question(run) ? live.answers[run] : null);

/** Returns the parameters of a layer as they are to be shown: at an epoch of training, or with dragged centers. */
function currentParameters(run, n) {
  const { layers, history } = views[run];
  const { parameters, number } = layers[n];
  if (isPast(run)) return pastParameters(history, number, parameters) || parameters;
  return movedParameters(run, n);
}

/** Returns whether a run is shown as it was at an epoch of its training. */
const isPast = (run) => state.epoch >= 0 && Boolean(views[run].history);

/** Returns the parameters of a layer of the checkpoint, with dragged centers. */
function movedParameters(run, n) {
  const { parameters } = views[run].layers[n];
  const moved = Object.entries(state.centers).filter(([name]) => name.startsWith(`${n}:`));
  if (run !== state.run || !moved.length) return parameters;
  const part = parameters.position || parameters;
  const centers = Float32Array.from(part.centers);
  centers.shape = part.centers.shape;
  for (const [name, center] of moved) centers.set(center, 2 * Number(name.split(":")[1]));
  return parameters.position ? { ...parameters, position: { ...part, centers } } : { ...part, centers };
}

/** Returns a layer's numbers, of its first `heads`, at the epoch that is chosen, or at the last where a run had fewer. */
function atEpoch(array, number, heads) {
  const size = array.shape.slice(2).reduce((a, b) => a * b, 1);
  const start = (Math.min(state.epoch, array.shape[0] - 1) * array.shape[1] + number) * size;
  const values = array.subarray(start, start + (size / array.shape[2]) * heads);
  values.shape = [heads, ...array.shape.slice(3)];
  return values;
}

/** Returns what position alone scored at the epoch that is chosen; null where the history has no such scores. */
function pastParameters(history, number, parameters) {
  const at = (array) => atEpoch(array, number, headsOf(parameters));
  if (history.precision) {
    const gaussian = { encoding: "gaussian", centers: at(history.center), precisions: at(history.precision) };
    return history.gate ? { ...gaussian, shares: at(history.gate) } : gaussian;
  }
  if (!history.row_scores) return null;
  return { encoding: "learned", row_scores: at(history.row_scores), column_scores: at(history.column_scores) };
}

/** Returns mean and covariance of a head's shift at the epoch that is chosen, where the history has just these. */
function pastOutline(run, n, head) {
  const { history, layers } = views[run];
  if (!onlyMoments(run)) return null;
  const at = (array, size) => Array.from(atEpoch(array, layers[n].number, head + 1).subarray(head * size));
  return { center: at(history.mean_shift, 2), covariance: at(history.covariance, 4) };
}

/**
 * Returns what a layer sees of the current picture, one entry for each image that maps are averaged over; null where the
 * page does not know: of a picture of one's own until the network has answered, or without a network.
 */
function inputs(run, n) {
  const { features, parameters } = views[run].layers[n];
  const shared = features || parameters.maps;
  if (!shared || (!features && shared.shape[0] === 1)) return [{}];
  const found = features && answer(run);
  if (found) return [{ x: found.seen[n] }];
  const size = shared.length / shared.shape[0];
  const of = (image) => (features ? { x: features.subarray(image * size, (image + 1) * size) } : { image });
  if (state.image === "average") return Array.from({ length: shared.shape[0] }, (_, image) => of(image));
  return Number.isInteger(state.image) && state.image < shared.shape[0] ? [of(state.image)] : null;
}

/** Returns the query and the grid of a layer with its padding, which is attended to as well but has no pixels to draw. */
function padded(layer) {
  const { grid, padding } = layer;
  return { grid: grid.map((side) => side + 2 * padding), query: queryOn(layer).map((at) => at + padding) };
}

/** Returns what `of`, `scores` or `probabilities`, gives for a head at the query; null where `inputs` are not known. */
function averaged(of, run, n, head, parameters, options) {
  const { query, grid } = padded(views[run].layers[n]);
  const seen = inputs(run, n);
  return seen && averageOf(seen.map((input) => of(parameters, head, query, grid, { ...input, ...options })));
}

/**
 * Returns one head's map at the query: `values`, what is to be drawn; `grid`; `query`; `outline`; `off`; `P`, its
 * probabilities; and `whole`, {P, grid, query} with the padding. Where it is not known what the layer sees, `values` and
 * `P` are null; where that is because the epoch is `past`, there is an outline all the same.
 */
function headMap(run, n, head, { parameters = currentParameters(run, n), kind = state.values } = {}) {
  const layer = views[run].layers[n];
  const map = { grid: layer.grid, query: queryOn(layer), off: isOff(run, n, head), values: null, P: null };
  const past = pastOutline(run, n, head);
  if (past) return { ...map, past: true, outline: past };
  const options = { part: state.part };
  const P = averaged(probabilities, run, n, head, parameters, options);
  if (!P) return map;
  map.whole = { P, ...padded(layer) };
  const crop = (values) => cropped(values, map.whole.grid, layer.padding);
  map.P = crop(P);
  map.scores = kind === "scores";
  map.values = map.scores ? crop(averaged(scores, run, n, head, parameters, options)) : map.P;
  if (state.outlines) map.outline = outlineOf(parameters, head, map);
  return map;
}

const isOff = (run, n, head) => run === state.run && state.off.includes(`${n}:${head}`);

function averageOf(arrays) {
  if (arrays.length === 1) return arrays[0];
  return arrays[0].map((_, k) => arrays.reduce((sum, array) => sum + array[k], 0) / arrays.length);
}

/** Returns values on a grid without its padding. */
function cropped(P, [height, width], padding) {
  if (!padding) return P;
  const result = [];
  for (let k = padding; k < height - padding; k++) result.push(...P.subarray(k * width + padding, (k + 1) * width - padding));
  return Float32Array.from(result);
}

/** Returns center and covariance to draw: of the Gaussian that the head is, or else of what it attends to. */
function outlineOf(parameters, head, { whole }) {
  const gaussian = state.part === "content" ? null : gaussianOf(parameters, head);
  if (gaussian) return { center: gaussian.center, covariance: inverse(gaussian.precision) };
  const { mean, covariance } = measures(whole);
  return { center: mean, covariance };
}

/** Returns the maps of all heads of a run, by layer. */
function allMaps(run) {
  return views[run].layers.map((layer, n) => {
    const parameters = currentParameters(run, n);
    return Array.from({ length: headsOf(parameters) }, (_, head) => headMap(run, n, head, { parameters }));
  });
}

/** Returns the maps of the first run minus those of the second; null where that has no such head on the same grid. */
function differences(first, second) {
  const layerOf = (name) => second[views[state.other].layers.findIndex((layer) => layer.name === name)];
  return first.map((heads, n) => {
    const others = layerOf(views[state.run].layers[n].name);
    return heads.map((map, head) => difference(map, others?.[head]));
  });
}

function difference(map, other) {
  if (!other?.values || !map.values || String(other.grid) !== String(map.grid)) return null;
  const values = map.values.map((value, k) => value - other.values[k]);
  return { values, grid: map.grid, query: map.query, signed: true };
}

/** Returns the probabilities of the classes as they are now: the network's, or those that came with the page. */
function prediction() {
  const { probabilities: shipped, classes } = view();
  const found = answer(state.run);
  if (found) return softmax(found.logits);
  if (!shipped || !Number.isInteger(state.image)) return null;
  return shipped.subarray(state.image * classes.length, (state.image + 1) * classes.length);
}
