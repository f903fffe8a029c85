"use strict";
/**
 * Reads the documents of the page: JSON whose arrays, {"$": [dtype, shape, place]}, stand for numbers in a base64 text
 * beside it. They become typed arrays with a `shape`; half precision becomes single precision.
 */

/** Returns the document called `name`, with its arrays. */
async function readDocument(name) {
  const buffer = await decompressed(document.getElementById(`${name}-numbers`).textContent.trim());
  return JSON.parse(document.getElementById(name).textContent, (key, value) =>
    value && value.$ ? typedArray(buffer, ...value.$) : value,
  );
}

/** Returns the bytes of a gzip file that is written in base64. */
async function decompressed(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n++) bytes[n] = text.charCodeAt(n);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const ARRAY_TYPES = {
  float32: Float32Array,
  uint8: Uint8Array,
  int32: Int32Array,
  int64: BigInt64Array,
  float16: Uint16Array,
};

function typedArray(buffer, dtype, shape, place) {
  const size = shape.reduce((a, b) => a * b, 1);
  let array = new ARRAY_TYPES[dtype](buffer, place, size);
  if (dtype === "float16") array = fromHalf(array);
  if (dtype === "int64") array = Float64Array.from(array, Number);
  array.shape = shape;
  return array;
}

/** Returns single precision of the bits of half precision: a sign, five bits of exponent, ten of the fraction. */
function fromHalf(bits) {
  const values = new Float32Array(65536);
  for (let half = 0; half < 65536; half++) {
    const exponent = (half >> 10) & 31;
    const fraction = half & 1023;
    const size =
      exponent === 31 ? (fraction ? NaN : Infinity) : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
    values[half] = half >> 15 ? -size : size;
  }
  return Float32Array.from(bits, (half) => values[half]);
}
