"use strict";
/**
 * The network, computed in the browser from the steps that network.py describes. Grids are {data, height, width,
 * features}, row by row.
 */

/**
 * Computes the logits of a normalised picture, and what each attention layer sees, in slices: a generator that yields
 * the share that is done, so that its caller can let the page breathe.
 *
 * `layers` are the view's; `off` has the heads, as "layer:head", that add nothing.
 */
function* runNetwork(steps, layers, picture, off = new Set()) {
  let x = picture;
  const kept = [];
  const seen = [];
  for (let n = 0; n < steps.length; n++) {
    const step = steps[n];
    if (step.op === "keep") kept.push(x);
    else if (step.op === "add") x = sum(x, step.shortcut ? convolution(step.shortcut, kept.pop()) : kept.pop());
    else if (step.op === "attention" && "layer" in step) {
      const padded = pad(x, step.padding);
      seen[step.layer] = padded.data;
      x = yield* attention(step, layers[step.layer], padded, off, (share) => (n + share) / steps.length);
    } else x = OPERATIONS[step.op](step, x);
    yield (n + 1) / steps.length;
  }
  return { logits: x.data, seen };
}

const OPERATIONS = {
  patches: ({ side }, { data, height, width, features }) => {
    const y = grid(height / side, width / side, side * side * features);
    let n = 0;
    for (let i = 0; i < y.height; i++)
      for (let j = 0; j < y.width; j++)
        for (let row = i * side; row < (i + 1) * side; row++)
          for (let column = j * side; column < (j + 1) * side; column++)
            for (let f = 0; f < features; f++) y.data[n++] = data[(row * width + column) * features + f];
    return y;
  },
  linear: ({ kernel, bias }, x) => {
    const y = grid(x.height, x.width, bias.length);
    for (let pixel = 0; pixel < x.height * x.width; pixel++) {
      const row = y.data.subarray(pixel * y.features, (pixel + 1) * y.features);
      row.set(bias);
      addProduct(row, x.data.subarray(pixel * x.features, (pixel + 1) * x.features), kernel, 0);
    }
    return y;
  },
  attention: ({ bias }, x) => withBias(grid(x.height, x.width, bias.length), bias), // without heads
  convolution: (step, x) => convolution(step, x),
  norm: ({ scale, bias, epsilon }, x) => {
    const y = grid(x.height, x.width, x.features);
    for (let start = 0; start < x.data.length; start += x.features) {
      let mean = 0;
      let variance = 0;
      for (let f = 0; f < x.features; f++) mean += x.data[start + f] / x.features;
      for (let f = 0; f < x.features; f++) variance += (x.data[start + f] - mean) ** 2 / x.features;
      const inverse = 1 / Math.sqrt(variance + epsilon);
      for (let f = 0; f < x.features; f++) y.data[start + f] = (x.data[start + f] - mean) * inverse * scale[f] + bias[f];
    }
    return y;
  },
  gelu: (step, x) => ({ ...x, data: x.data.map((v) => (v / 2) * (1 + erf(v * Math.SQRT1_2))) }),
  relu: (step, x) => ({ ...x, data: x.data.map((v) => (v > 0 ? v : 0)) }),
  mean: (step, x) => {
    const y = grid(1, 1, x.features);
    const pixels = x.height * x.width;
    for (let n = 0; n < x.data.length; n++) y.data[n % x.features] += x.data[n] / pixels;
    return y;
  },
};

/** Returns a grid of zeros. */
function grid(height, width, features) {
  return { data: new Float32Array(height * width * features), height, width, features };
}

function withBias(y, bias) {
  for (let n = 0; n < y.data.length; n++) y.data[n] += bias[n % bias.length];
  return y;
}

function sum(a, b) {
  return { ...a, data: a.data.map(adding(b.data)) };
}

/** Returns x with zeros around it. */
function pad(x, before, after = before) {
  if (!before && !after) return x;
  const y = grid(x.height + before + after, x.width + before + after, x.features);
  for (let i = 0; i < x.height; i++) {
    const row = x.data.subarray(i * x.width * x.features, (i + 1) * x.width * x.features);
    y.data.set(row, ((i + before) * y.width + before) * x.features);
  }
  return y;
}

/** Returns the convolution of x; the kernel is (rows, columns, in, out). */
function convolution({ kernel, bias, before, after, stride }, x) {
  const padded = pad(x, before, after);
  const [rows, columns, inputs, outputs] = kernel.shape;
  const size = (length, extent) => Math.floor((length - extent) / stride) + 1;
  const y = grid(size(padded.height, rows), size(padded.width, columns), outputs);
  for (let i = 0; i < y.height; i++)
    for (let j = 0; j < y.width; j++) {
      const out = y.data.subarray((i * y.width + j) * outputs, (i * y.width + j + 1) * outputs);
      out.set(bias);
      for (let row = 0; row < rows; row++) {
        const start = ((i * stride + row) * padded.width + j * stride) * inputs;
        addProduct(out, padded.data.subarray(start, start + columns * inputs), kernel, row * columns * inputs * outputs);
      }
    }
  return y;
}

/** Returns sum_h A_h x W_h + bias of a padded grid, at every `stride`-th query of those that are not padding. */
function* attention({ layer, value, bias, padding, stride }, { parameters }, x, off, progress) {
  const [heads, features, outputs] = value.shape;
  const queries = (side) => Math.ceil((side - 2 * padding) / stride);
  const y = withBias(grid(queries(x.height), queries(x.width), outputs), bias);
  const mixed = new Float32Array(features);
  for (let head = 0; head < heads; head++) {
    if (off.has(`${layer}:${head}`)) continue;
    for (let i = 0; i < y.height; i++) {
      for (let j = 0; j < y.width; j++) {
        const query = [i * stride + padding, j * stride + padding];
        const P = probabilities(parameters, head, query, [x.height, x.width], { x: x.data });
        addProduct(mixed.fill(0), P, x.data, 0);
        const out = y.data.subarray((i * y.width + j) * outputs, (i * y.width + j + 1) * outputs);
        addProduct(out, mixed, value, head * features * outputs);
      }
      yield progress((head + (i + 1) / y.height) / heads);
    }
  }
  return y;
}

/** Returns the error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26). */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - tail * Math.exp(-x * x));
}

/** Returns the grid of pixels from 0 to 255 that the network takes: (pixel / 255 - mean) / deviation. */
function normalised(pixels, [height, width, features], mean, std) {
  const x = grid(height, width, features);
  for (let n = 0; n < pixels.length; n++) x.data[n] = (pixels[n] / 255 - mean[n % features]) / std[n % features];
  return x;
}

/** Returns the pixels of a picture, {data, width, height} in RGBA, at a size, in colour or grey, as Pillow makes them. */
function fitted(picture, [height, width, channels]) {
  const colors = new Uint8ClampedArray(3 * picture.width * picture.height);
  for (let n = 0; n < colors.length; n++) colors[n] = picture.data[n + Math.floor(n / 3)]; // without opacity
  const wide = resampled(colors, picture.height, picture.width, 3, width);
  const pixels = resampled(wide, 1, picture.height, 3 * width, height);
  if (channels > 1) return pixels;
  const grey = (r, g, b) => (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
  return Uint8Array.from({ length: height * width }, (_, n) => grey(...pixels.subarray(3 * n, 3 * n + 3)));
}

/**
 * Returns rows of `length` samples, each of `features` numbers, at another length: the cubic filter (a = -1/2) of
 * Pillow's resize, widened where it shrinks.
 */
function resampled(rows, count, length, features, size) {
  const scale = Math.max(length / size, 1);
  const result = new Uint8ClampedArray(count * size * features);
  for (let n = 0; n < size; n++) {
    const center = ((n + 0.5) * length) / size;
    const first = Math.max(0, Math.trunc(center - 2 * scale + 0.5));
    const last = Math.min(length, Math.trunc(center + 2 * scale + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => cubic((first + k - center + 0.5) / scale));
    const sum = total(weights);
    for (let row = 0; row < count; row++)
      for (let f = 0; f < features; f++) {
        let value = 0;
        for (let k = first; k < last; k++) value += weights[k - first] * rows[(row * length + k) * features + f];
        result[(row * size + n) * features + f] = Math.floor(value / sum + 0.5);
      }
  }
  return result;
}

function cubic(x) {
  const distance = Math.abs(x);
  if (distance < 1) return (1.5 * distance - 2.5) * distance * distance + 1;
  return distance < 2 ? ((-0.5 * distance + 2.5) * distance - 4) * distance + 2 : 0;
}
