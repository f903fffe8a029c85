"use strict";
/**
 * What each head attends to: scores of each encoding, probabilities, and the numbers that describe them.
 *
 * A query pixel q = [i, j] looks at a key pixel [k, l] through their shift d = [k - i, l - j]. Grids are row by row.
 * `parameters` are a layer's, as view.py writes them; `x` is what the layer sees, (H W features), where scores need it.
 */

/** Of encodings that add or mix two: which encoding their `position` is. */
const POSITION_OF = { learned_content: "learned_query", learned_content_position: "learned", gated: "quadratic" };

/** Returns the part of parameters that scores position, by itself; null where there is none. */
function positional(parameters) {
  if (parameters.encoding === "maps") return null;
  const encoding = POSITION_OF[parameters.encoding];
  return encoding ? { ...parameters.position, encoding } : parameters;
}

function dot(a, from, b, start, length) {
  let sum = 0;
  for (let n = 0; n < length; n++) sum += a[from + n] * b[start + n];
  return sum;
}

/** Row and column terms, functions of the shift, of the encodings whose score is their sum. */
const TERMS = {
  quadratic: (p, head) =>
    [0, 1].map((axis) => (d) => -0.5 * (p.spreads[head] * (d - p.centers[2 * head + axis])) ** 2),
  learned: (p, head) =>
    [p.row_scores, p.column_scores].map((scores) => {
      const shifts = scores.shape[1];
      return (d) => scores[head * shifts + d + (shifts >> 1)];
    }),
  learned_query: (p, head, x, pixel) =>
    [
      [p.row_keys, p.row_biases],
      [p.column_keys, p.column_biases],
    ].map(([keys, biases]) => {
      const [, shifts, features] = keys.shape;
      return (d) => {
        const at = head * shifts + d + (shifts >> 1);
        return dot(x, pixel * features, keys, at * features, features) + biases[at];
      };
    }),
};

/** Scores, functions of both shifts, of the others. */
const BY_SHIFT = {
  quadratic_generalized: (p, head) => {
    const [a, b, c, d] = p.spreads.subarray(4 * head, 4 * head + 4);
    return (row, column) => {
      const [along, across] = [row - p.centers[2 * head], column - p.centers[2 * head + 1]];
      return -0.5 * ((a * along + c * across) ** 2 + (b * along + d * across) ** 2);
    };
  },
  gaussian: (p, head) => {
    const [a, b, c, d] = p.precisions.subarray(4 * head, 4 * head + 4);
    return (row, column) => {
      const [along, across] = [row - p.centers[2 * head], column - p.centers[2 * head + 1]];
      return -0.5 * (a * along * along + (b + c) * along * across + d * across * across);
    };
  },
  by_shift: (p, head) => {
    const [, rows, columns] = p.scores.shape;
    return (row, column) => p.scores[(head * rows + row + (rows >> 1)) * columns + column + (columns >> 1)];
  },
};

/** Returns the scores of position: of all keys, for one query. */
function positionScores(p, head, [i, j], [height, width], x) {
  const scores = new Float32Array(height * width);
  if (p.encoding in TERMS) {
    const [row, column] = TERMS[p.encoding](p, head, x, i * width + j);
    const columns = Float64Array.from({ length: width }, (_, l) => column(l - j));
    for (let k = 0; k < height; k++) {
      const term = row(k - i);
      for (let l = 0; l < width; l++) scores[k * width + l] = term + columns[l];
    }
    return scores;
  }
  const score = BY_SHIFT[p.encoding](p, head);
  for (let k = 0; k < height; k++) for (let l = 0; l < width; l++) scores[k * width + l] = score(k - i, l - j);
  return scores;
}

/** Returns the scores of content, (x_q Q_h + b_h) . x_k, of all keys for one query. */
function contentScores({ query, bias }, head, [i, j], [height, width], x) {
  const features = query.shape[1];
  const meets = Float32Array.from(bias.subarray(head * features, (head + 1) * features));
  addProduct(meets, x.subarray((i * width + j) * features, (i * width + j + 1) * features), query, head * features * features);
  return Float32Array.from({ length: height * width }, (_, key) => dot(meets, 0, x, key * features, features));
}

/** Adds to `y` the vector `x` times a matrix, (x.length, y.length), that starts at `start` in `matrix`. */
function addProduct(y, x, matrix, start) {
  const [inputs, outputs] = [x.length, y.length];
  let row = start;
  let n = 0;
  for (; n + 3 < inputs; n += 4) {
    const [a, b, c, d] = [x[n], x[n + 1], x[n + 2], x[n + 3]];
    const [second, third, fourth] = [row + outputs, row + 2 * outputs, row + 3 * outputs];
    for (let o = 0; o < outputs; o++)
      y[o] += a * matrix[row + o] + b * matrix[second + o] + c * matrix[third + o] + d * matrix[fourth + o];
    row += 4 * outputs;
  }
  for (; n < inputs; n++, row += outputs) for (let o = 0; o < outputs; o++) y[o] += x[n] * matrix[row + o];
}

/** Returns the softmax of `sharpness` times the scores. */
function softmax(scores, sharpness = 1) {
  let largest = -Infinity;
  for (let n = 0; n < scores.length; n++) if (scores[n] > largest) largest = scores[n];
  const result = new Float32Array(scores.length);
  let sum = 0;
  for (let n = 0; n < scores.length; n++) sum += result[n] = Math.exp(sharpness * (scores[n] - largest));
  for (let n = 0; n < scores.length; n++) result[n] /= sum;
  return result;
}

/**
 * Returns the scores of all keys for one query, before the softmax.
 *
 * `part` is "total", or of encodings with content also "position" or "content" alone; `image` counts the maps of
 * encodings that the page knows by their maps alone. Where probabilities are mixed, the scores are their logarithms.
 */
function scores(parameters, head, query, grid, { x, image = 0, part = "total" } = {}) {
  if (parameters.encoding === "maps") return mapOf(parameters, head, query, grid, image).map(logarithm);
  const position = () => positionScores(positional(parameters), head, query, grid, x);
  if (!parameters.content || part === "position") return position();
  const content = contentScores(parameters.content, head, query, grid, x);
  if (part === "content") return content;
  if (parameters.encoding !== "gated") return content.map(adding(position()));
  const gate = gateOf(parameters, head);
  const where = softmax(position());
  return softmax(content).map((p, n) => logarithm((1 - gate) * p + gate * where[n]));
}

/** Returns what one query attends to, a probability for each key; the options are those of `scores`. */
function probabilities(parameters, head, query, grid, options = {}) {
  return softmax(scores(parameters, head, query, grid, options), options.sharpness);
}

/** Returns log p, but for p = 0 the logarithm of a number that is 0 in single precision. */
const logarithm = (p) => (p > 0 ? Math.log(p) : -104);

const adding = (others) => (value, n) => value + others[n];

/** Returns the share of position in a gated head; of others undefined. */
const gateOf = ({ gates, shares }, head) => (gates ? 1 / (1 + Math.exp(-gates[head])) : shares?.[head]);

function mapOf({ maps, largest }, head, [i, j], [height, width], image) {
  const pixels = height * width;
  const at = (image * maps.shape[1] + head) * pixels + i * width + j;
  return Float32Array.from(maps.subarray(at * pixels, (at + 1) * pixels), (value) => (value * largest[at]) / 255);
}

/** Returns how many heads the parameters are of. */
function headsOf(parameters) {
  if (parameters.encoding === "maps") return parameters.maps.shape[1];
  const p = positional(parameters);
  return (p.centers || p.row_scores || p.row_keys || p.scores).shape[0];
}

/** Returns center and precision, the inverse covariance, of a head that is a Gaussian; else null. */
function gaussianOf(parameters, head) {
  const p = positional(parameters);
  if (!p || !p.centers) return null;
  const center = Array.from(p.centers.subarray(2 * head, 2 * head + 2));
  if (p.precisions) return { center, precision: Array.from(p.precisions.subarray(4 * head, 4 * head + 4)) };
  if (p.encoding === "quadratic") return { center, precision: [p.spreads[head] ** 2, 0, 0, p.spreads[head] ** 2] };
  const [a, b, c, d] = p.spreads.subarray(4 * head, 4 * head + 4);
  return { center, precision: [a * a + b * b, a * c + b * d, a * c + b * d, c * c + d * d] };
}

/** Returns what a head does at a query: mean, covariance and peak of the shift, entropy in nats, mass in windows. */
function measures({ P, query: [i, j], grid: [height, width] }) {
  const result = { mean: [0, 0], covariance: [0, 0, 0, 0], entropy: 0, peak: 0, peakShift: [0, 0], mass: { 3: 0, 5: 0 } };
  for (let k = 0; k < height; k++)
    for (let l = 0; l < width; l++) {
      const [p, row, column] = [P[k * width + l], k - i, l - j];
      const ring = Math.max(Math.abs(row), Math.abs(column));
      if (p > result.peak) [result.peak, result.peakShift] = [p, [row, column]];
      if (p > 0) result.entropy -= p * Math.log(p);
      result.mean[0] += p * row;
      result.mean[1] += p * column;
      if (ring <= 1) result.mass[3] += p;
      if (ring <= 2) result.mass[5] += p;
    }
  for (let k = 0; k < height; k++)
    for (let l = 0; l < width; l++) {
      const [p, row, column] = [P[k * width + l], k - i - result.mean[0], l - j - result.mean[1]];
      result.covariance[0] += p * row * row;
      result.covariance[1] += p * row * column;
      result.covariance[3] += p * column * column;
    }
  result.covariance[2] = result.covariance[1];
  return result;
}

/** Returns the inverse of a symmetric 2 x 2 matrix; null where it has none. */
function inverse([a, b, c, d]) {
  const determinant = a * d - b * c;
  return determinant > 1e-12 ? [d / determinant, -b / determinant, -c / determinant, a / determinant] : null;
}

/** Returns the largest probability such that the keys with at least that much hold `share` of the mass. */
function densityThreshold(P, share) {
  const sorted = Float32Array.from(P).sort();
  const wanted = share * sorted.reduce((a, b) => a + b, 0) * (1 - 1e-6);
  let sum = 0;
  for (let n = sorted.length - 1; n >= 0; n--) if ((sum += sorted[n]) >= wanted) return sorted[n];
  return 0;
}

/**
 * Returns the energy of the kernel sum_h P_h W_h at each key: the squares of its numbers, summed. `gram`, the products
 * <W_h, W_g>, is all of the value maps that it takes.
 */
function energies(P, gram) {
  const result = new Float64Array(P[0].length);
  for (let h = 0; h < P.length; h++)
    for (let g = 0; g < P.length; g++) {
      const [weight, first, second] = [gram[h * P.length + g], P[h], P[g]];
      for (let n = 0; n < result.length; n++) result[n] += weight * first[n] * second[n];
    }
  return result;
}

const total = (values) => values.reduce((a, b) => a + b, 0);

/** Returns P with all of its mass on its largest probability: the nearest tap. */
function nearestTap(P) {
  const tap = new Float32Array(P.length);
  tap[P.indexOf(Math.max(...P))] = 1;
  return tap;
}

/** Returns |sum_h (P_h - tap_h) W_h| / |sum_h tap_h W_h|: how far the kernel is from the convolution of nearest taps. */
function distanceToTaps(P, gram) {
  const taps = P.map(nearestTap);
  const off = P.map((probability, h) => probability.map((p, n) => p - taps[h][n]));
  return Math.sqrt(Math.max(total(energies(off, gram)), 0) / total(energies(taps, gram)));
}

/** Returns the share of the energy in the side x side window around the query. */
function windowShare(energy, [i, j], [height, width], side) {
  let inside = 0;
  for (let n = 0; n < energy.length; n++) {
    const [row, column] = [Math.floor(n / width) - i, (n % width) - j];
    if (Math.max(Math.abs(row), Math.abs(column)) <= (side - 1) / 2) inside += energy[n];
  }
  return inside / total(energy);
}
