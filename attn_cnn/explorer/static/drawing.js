"use strict";
/**
 * Maps of heads as pictures. Everything is drawn with a pen, of which there are two: one draws on a canvas, the other
 * writes SVG, so that what is saved is what is seen.
 */

/** Returns a pen that draws on a canvas of the given size in CSS pixels, with `scale` pixels of its own for each. */
function canvasPen(canvas, width, height, scale = window.devicePixelRatio || 1) {
  const context = canvas.getContext("2d");
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.imageSmoothingEnabled = false;
  const trace = (lines) => {
    context.beginPath();
    for (const points of lines) points.forEach(([x, y], n) => (n ? context.lineTo(x, y) : context.moveTo(x, y)));
  };
  return {
    picture: (source, x, y, w, h) => context.drawImage(source, x, y, w, h),
    rectangle: (x, y, w, h, color) => {
      context.fillStyle = color;
      context.fillRect(x, y, w, h);
    },
    lines: (lines, color, thickness, dashes = []) => {
      trace(lines);
      [context.strokeStyle, context.lineWidth] = [color, thickness];
      context.setLineDash(dashes);
      context.stroke();
    },
    text: (words, x, y, color, size, anchor = "middle", weight = 400) => {
      [context.fillStyle, context.textAlign] = [color, { start: "left", middle: "center", end: "right" }[anchor]];
      context.font = `${weight} ${size}px system-ui, sans-serif`;
      context.fillText(words, x, y);
    },
    clipped: (x, y, w, h, draw) => {
      context.save();
      context.beginPath();
      context.rect(x, y, w, h);
      context.clip();
      draw();
      context.restore();
    },
  };
}

/** Returns a pen that writes SVG, and `end()`, which returns it. */
function svgPen(width, height) {
  const parts = [];
  let clips = 0;
  const numbers = (values) => values.map((value) => +value.toFixed(2)).join(" ");
  return {
    picture: (source, x, y, w, h) =>
      parts.push(
        `<image x="${x}" y="${y}" width="${w}" height="${h}" preserveAspectRatio="none" ` +
          `style="image-rendering:pixelated" href="${source.toDataURL()}"/>`,
      ),
    rectangle: (x, y, w, h, color) =>
      parts.push(`<rect x="${x}" y="${y}" width="${w}" height="${h}" fill="${color}"/>`),
    lines: (lines, color, thickness, dashes = []) =>
      parts.push(
        `<path d="${lines.map((points) => `M${points.map(numbers).join("L")}`).join("")}" fill="none" ` +
          `stroke="${color}" stroke-width="${thickness}" stroke-dasharray="${dashes.join(" ")}"/>`,
      ),
    text: (words, x, y, color, size, anchor = "middle", weight = 400) =>
      parts.push(
        `<text x="${x}" y="${y}" fill="${color}" font-size="${size}" font-weight="${weight}" ` +
          `text-anchor="${anchor}" font-family="system-ui, sans-serif">${escaped(words)}</text>`,
      ),
    clipped: (x, y, w, h, draw) => {
      clips++;
      parts.push(`<clipPath id="clip${clips}"><rect x="${x}" y="${y}" width="${w}" height="${h}"/></clipPath>`);
      parts.push(`<g clip-path="url(#clip${clips})">`);
      draw();
      parts.push("</g>");
    },
    end: () =>
      `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}">` +
      `${parts.join("")}</svg>`,
  };
}

const escaped = (words) => String(words).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

/** Returns the colours of the page as it looks now, [r, g, b] each, and texts of them. */
function palette() {
  const style = getComputedStyle(document.getElementById("large"));
  const channels = (color) => color.match(/[\d.]+/g).slice(0, 3).map(Number);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return {
    dark,
    text: style.color,
    quiet: style.textDecorationColor,
    surface: style.backgroundColor,
    accent: style.accentColor,
    empty: dark ? "#2a2e36" : "#efece7",
    more: channels(style.accentColor),
    less: dark ? [108, 178, 255] : [24, 92, 168],
    ground: channels(style.backgroundColor),
  };
}

const SMALL = 90; // pixels of the screen: a map that is no wider has room for nothing but itself

const scratch = document.createElement("canvas");

/** Returns a canvas, overwritten by the next call, with a colour for each pixel: `color(n)` is [r, g, b, opacity]. */
function pixels(height, width, color) {
  [scratch.width, scratch.height] = [width, height];
  const context = scratch.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(width, height);
  for (let n = 0; n < height * width; n++) {
    const [r, g, b, opacity] = color(n);
    image.data[4 * n] = r;
    image.data[4 * n + 1] = g;
    image.data[4 * n + 2] = b;
    image.data[4 * n + 3] = 255 * opacity;
  }
  context.putImageData(image, 0, 0);
  return scratch;
}

/** Returns a canvas with a picture of `channels`, as it is. */
function inColor(picture, [height, width, channels]) {
  return pixels(height, width, (n) => {
    const [r, g, b] = [0, 1, 2].map((c) => picture[n * channels + (c % channels)]);
    return [r, g, b, 1];
  });
}

/** Returns a canvas of its own with a picture in grey so pale that it does not change the colours of maps on it. */
function backdrop(picture, [height, width, channels], { ground, dark }) {
  const drawn = pixels(height, width, (n) => {
    let grey = 0;
    for (let c = 0; c < channels; c++) grey += picture[n * channels + c] / channels;
    const color = ground.map((g) => (dark ? g + (grey / 255) * 34 : g - (1 - grey / 255) * 30));
    return [...color, 1];
  });
  const own = document.createElement("canvas");
  [own.width, own.height] = [width, height];
  own.getContext("2d").drawImage(drawn, 0, 0);
  return own;
}

/** Returns the least number that is not minus infinity, and the greatest. */
function extremes(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low && value > -Infinity) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** Returns a canvas with a map: from clear at 0, of scores at the least, to the accent; or signed, between two colours. */
function heat({ values, grid: [height, width], scores, signed }, { more, less }) {
  const [least, greatest] = extremes(values);
  const low = scores ? least : 0;
  const range = (signed ? Math.max(greatest, -least) : greatest - low) || 1;
  return pixels(height, width, (n) => {
    if (signed) return [...(values[n] > 0 ? more : less), 0.92 * Math.min(1, Math.abs(values[n]) / range)];
    return [...more, 0.92 * Math.max(0, (values[n] - low) / range)];
  });
}

/** Returns where the border lies between the keys with at least `threshold` and the others, as lines on the grid. */
function contour(P, [height, width], threshold) {
  const inside = (k, l) => k >= 0 && l >= 0 && k < height && l < width && P[k * width + l] >= threshold;
  const lines = [];
  for (let k = 0; k <= height; k++)
    for (let l = 0; l <= width; l++) {
      if (inside(k, l) !== inside(k - 1, l)) lines.push([[l, k], [l + 1, k]]);
      if (inside(k, l) !== inside(k, l - 1)) lines.push([[l, k], [l, k + 1]]);
    }
  return lines;
}

const HALF = Math.sqrt(2 * Math.log(2)); // within so many deviations lies half of a Gaussian of the plane

/** Returns the ellipse that holds half of a Gaussian, as [x, y] in pixels of the grid around [0, 0]. */
function ellipse([a, b, , d]) {
  const [half, off] = [(a + d) / 2, Math.hypot((a - d) / 2, b)];
  const angle = Math.atan2(2 * b, a - d) / 2;
  const [long, short] = [half + off, half - off].map((variance) => HALF * Math.sqrt(Math.max(variance, 0)));
  return Array.from({ length: 49 }, (_, n) => {
    const [u, v] = [long * Math.cos((n * Math.PI) / 24), short * Math.sin((n * Math.PI) / 24)];
    return [u * Math.sin(angle) + v * Math.cos(angle), u * Math.cos(angle) - v * Math.sin(angle)];
  });
}

/**
 * Draws the map of one head in a rectangle.
 *
 * `map` has `values`, `grid` and `query`; of heads with outlines `outline`, {center, covariance}; for contours
 * `P`; `scores` where these are the values, and `signed` where it is a difference.
 */
function drawMap(pen, map, x, y, width, height, colors, ground, { contours = false, thickness = 1.25 } = {}) {
  const [rows, columns] = map.grid;
  const [cellX, cellY] = [width / columns, height / rows];
  const place = ([column, row]) => [x + column * cellX, y + row * cellY];
  pen.clipped(x, y, width, height, () => {
    if (ground) pen.picture(ground, x, y, width, height);
    else pen.rectangle(x, y, width, height, colors.empty);
    if (map.off) return pen.lines([[[x, y], [x + width, y + height]]], colors.quiet, thickness);
    if (map.values) pen.picture(heat(map, colors), x, y, width, height);
    if (contours && map.P)
      for (const [share, dashes] of [[0.9, [4, 3]], [0.5, []]]) {
        const lines = contour(map.P, map.grid, densityThreshold(map.P, share)).map((line) => line.map(place));
        pen.lines(lines, colors.text, thickness, dashes);
      }
    if (map.outline) {
      const [row, column] = map.query.map((at, axis) => at + 0.5 + map.outline.center[axis]);
      if (map.outline.covariance) {
        const around = ellipse(map.outline.covariance).map(([dx, dy]) => place([column + dx, row + dy]));
        if (!contours) pen.lines([around], colors.text, thickness);
        else pen.lines([around], colors.accent, thickness + 1);
      }
      const [cx, cy] = place([column, row]);
      const arm = contours ? 6 : 3;
      const cross = [[[cx - arm, cy], [cx + arm, cy]], [[cx, cy - arm], [cx, cy + arm]]];
      if (width > SMALL) pen.lines(cross, colors.text, thickness + 0.5);
    }
    drawQuery(pen, place, map.query, thickness);
  });
}

/** Draws a frame around the query pixel that stands out on light and dark; in small maps a line that hides little. */
function drawQuery(pen, place, [i, j], thickness) {
  const frame = [[j, i], [j + 1, i], [j + 1, i + 1], [j, i + 1], [j, i], [j + 1, i]].map(place);
  if (thickness > 1) pen.lines([frame], "#000000", thickness + 1.5);
  pen.lines([frame], thickness > 1 ? "#ffffff" : "#7a7a7a", thickness);
}

/** Returns where the tiles of `rows` x `columns` heads lie on a canvas that is `width` wide, the first at `top`. */
function tiling(rows, columns, width, aspect, top = 20) {
  const [left, gap] = [22, columns > 12 || width < 480 ? 3 : 6];
  const tile = Math.min((width - left - gap * (columns - 1)) / columns, 150);
  const tall = tile * aspect;
  const at = (row, column) => [left + column * (tile + gap), top + row * (tall + gap), tile, tall];
  const find = (x, y) => {
    const [row, column] = [Math.floor((y - top) / (tall + gap)), Math.floor((x - left) / (tile + gap))];
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  };
  return { at, find, height: top + rows * (tall + gap) - gap + 2, left, top, tile, tall };
}

/** Draws all heads: a row of tiles for each layer, with its name. `maps[layer][head]` are as for drawMap. */
function drawMaps(pen, maps, tiles, colors, ground, names, chosen) {
  maps.forEach((heads, row) => {
    pen.text(names[row], 8, tiles.at(row, 0)[1] + tiles.tall / 2 + 4, colors.quiet, 12);
    heads.forEach((map, column) => {
      const [x, y, width, height] = tiles.at(row, column);
      if (row === 0) pen.text(String(column), x + width / 2, y - 8, colors.quiet, 12);
      if (!map) return;
      drawMap(pen, map, x, y, width, height, colors, ground, { thickness: width > SMALL ? 1.25 : 1 });
      if (chosen && row === chosen[0] && column === chosen[1]) {
        const [r, b] = [x + width, y + height];
        pen.lines([[[x, y], [r, y], [r, b], [x, b], [x, y], [r, y]]], colors.accent, 3);
      }
    });
  });
}
