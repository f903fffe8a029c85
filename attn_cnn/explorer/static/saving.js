"use strict";
/** The view as a picture, PNG or SVG, and its numbers as CSV. */

/** Returns every number of the view: a row for each run, layer, head and key. */
function asCsv() {
  const rows = ["run,image,part,epoch,layer,head,query_row,query_column,key_row,key_column,probability,score"];
  for (const run of compared() ? [state.run, state.other] : [state.run]) {
    const { name, layers, history } = views[run];
    const epoch = isPast(run) && history.epoch ? history.epoch[Math.min(state.epoch, history.epoch.length - 1)] : "";
    layers.forEach((layer, n) => {
      for (let head = 0; head < headsOf(layer.parameters); head++) {
        const { P, values, grid, query } = headMap(run, n, head, { kind: "scores" });
        const whose = [quoted(name), state.image, state.part, epoch, quoted(layer.name), head, ...query].join();
        for (let key = 0; P && key < P.length; key++)
          rows.push([whose, Math.floor(key / grid[1]), key % grid[1], +P[key].toPrecision(7), +values[key].toPrecision(7)].join());
      }
    });
  }
  return `${rows.join("\n")}\n`;
}

/** Returns a cell of CSV; one that a spreadsheet would take for a formula gets an apostrophe. */
function quoted(text) {
  const safe = /^[=+\-@]/.test(text) ? `'${text}` : text;
  return /[",\n']/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
}

const FIGURE_WIDTH = 960;

/** Returns what the page shows of all heads, ready to be drawn: parts with a title, maps and tiles, and the height. */
function figure() {
  let top = 0;
  const parts = shownMaps(allMaps(state.run)).map((shown) => {
    const tiles = tilesOf(shown.maps, FIGURE_WIDTH - 22, top + 56);
    top = tiles.height + 12;
    return { ...shown, tiles };
  });
  return { parts, height: top + 24 };
}

/** Returns what a figure shows, in words: the image, the query pixel, which numbers, and when. */
function figureCaption() {
  if (onlyMoments(state.run))
    return `mean and spread of each head's shift over images and all queries; ${$("epoch-output").textContent}`;
  const image = { average: "average of the images", own: "own picture" }[state.image] ?? `image ${state.image}`;
  const query = `query at row ${state.query[0]}, column ${state.query[1]}, counted from 0`;
  const values = `${state.part === "total" ? state.values : `${state.values} by ${state.part}`}, each head on its own scale`;
  const when = $("training").hidden ? [] : [$("epoch-output").textContent];
  return [view().images ? image : [], query, values, when].flat().join("; ");
}

function drawFigure(pen, { parts, height }) {
  const colors = palette();
  pen.rectangle(0, 0, FIGURE_WIDTH, height, colors.surface);
  for (const { title, maps, tiles, run } of parts) {
    pen.text(title, 22, tiles.top - 30, colors.text, 14, "start", 600);
    drawMaps(pen, maps, tiles, colors, ground(run, colors), views[run].layers.map(rowName));
  }
  pen.text(figureCaption(), 22, height - 12, colors.quiet, 12, "start");
}

/** Returns the view as SVG. */
function asSvg() {
  const drawn = figure();
  const pen = svgPen(FIGURE_WIDTH, drawn.height);
  drawFigure(pen, drawn);
  return pen.end();
}

/** Returns the view as a PNG, two pixels for each of the page's so that it prints well. */
function asPng() {
  const drawn = figure();
  const canvas = document.createElement("canvas");
  drawFigure(canvasPen(canvas, FIGURE_WIDTH, drawn.height, 2), drawn);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

/** Hands a file to the browser to save. */
function save(content, type, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = `${view().name.replace(/[^\w.-]+/g, "_")}_heads.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
