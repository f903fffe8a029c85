"use strict";
/** What the page shows of the state: `show` draws all of it, `change` changes the state and draws before the next frame. */

const $ = (id) => document.getElementById(id);
const percent = (share) => (share >= 0.9995 ? "100%" : `${(100 * share).toFixed(share > 0.995 || share < 0.0995 ? 1 : 0)}%`);
const byTouch = matchMedia("(hover: none)");
const signed = (value) => `${value < 0 ? "\u2212" : ""}${Math.abs(value).toFixed(2)}`;

/** Returns a shift in words, as "1 left, 2 down". */
function inWords([row, column]) {
  const part = (value, less, more) => {
    const size = Math.abs(value).toFixed(1).replace(/\.0$/, "");
    return size === "0" ? null : `${size} ${value < 0 ? less : more}`;
  };
  return [part(column, "left", "right"), part(row, "up", "down")].filter(Boolean).join(", ") || "on the query";
}

/** Makes an element with properties and children. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const grounds = []; // by run: the pale picture behind the maps, and what it was made of
let waiting = false;

/** Changes the state, and draws what follows before the next frame. */
function change(changes) {
  Object.assign(state, changes);
  keepInRange();
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    show();
  });
}

function show() {
  const colors = palette();
  $("pointer").textContent = ""; // what it said may no longer be so
  showChoices();
  showPicture(colors);
  showPrediction();
  if (view().layers.length) {
    const maps = allMaps(state.run);
    const shown = shownMaps(maps);
    showMaps(shown, colors);
    showHead(maps[state.layer][state.head], shown[0].maps[state.layer][state.head], colors);
    showTheorem(colors);
  }
  soon("address", 250, showAddress);
  soon("reader", 350, showForReaders);
}

const timers = {};

/** Calls a function once nothing has asked for it for so many milliseconds. */
function soon(name, milliseconds, call) {
  clearTimeout(timers[name]);
  timers[name] = setTimeout(call, milliseconds);
}

/** Returns the pale picture that a run's maps lie on; null where it has none. */
function ground(run, colors) {
  const drawn = picture(run);
  if (!drawn) return null;
  const key = [state.image, colors.dark, state.image === "own" && live.own.version].join();
  if (grounds[run]?.key !== key) grounds[run] = { key, canvas: backdrop(drawn, views[run].images.shape.slice(1), colors) };
  return grounds[run].canvas;
}

function showChoices() {
  $("about").textContent = view().about;
  $("run").value = state.run;
  $("other").value = state.other;
  for (const name of ["sides", "values", "part"]) check(name, state[name]);
  check("images", state.image);
  $("sides").hidden = !compared();
  $("part").hidden = !hasContent(view());
  $("outlines").checked = state.outlines;
  $("outlines").disabled = $("save-csv").disabled = onlyMoments(state.run);
  disable("values", onlyMoments(state.run));
  disable("part", isPast(state.run));
  $("restore").disabled = !state.off.length && !Object.keys(state.centers).length;
}

function disable(group, disabled) {
  for (const input of $(group).querySelectorAll("input")) input.disabled = disabled;
}

function check(group, value) {
  for (const input of $(group).querySelectorAll("input")) input.checked = input.value === String(value);
}

function showPicture(colors) {
  const canvas = $("picture");
  const [rows, columns] = finestGrid();
  const [tall, wide] = view().images ? view().images.shape.slice(1) : [rows, columns];
  canvas.style.aspectRatio = `${wide} / ${tall}`;
  const width = canvas.clientWidth;
  const height = (width * tall) / wide;
  const pen = canvasPen(canvas, width, height);
  const drawn = picture();
  if (drawn) pen.picture(inColor(drawn, view().images.shape.slice(1)), 0, 0, width, height);
  else pen.rectangle(0, 0, width, height, colors.empty);
  $("picture-help").hidden = !view().layers.length || drawing;
  if (!view().layers.length) return;
  $("picture-help").textContent = byTouch.matches
    ? "Tap a pixel to choose the query."
    : pinned
    ? "Pinned. Click the pixel again to choose by pointing; arrow keys move it."
    : "Point to choose, click or tap to pin, arrow keys to move.";
  drawQuery(pen, ([x, y]) => [(x * width) / columns, (y * height) / rows], state.query, 2);
  const pixel = `row ${state.query[0]}, column ${state.query[1]} of a ${rows}x${columns} grid, counted from 0`;
  canvas.setAttribute("aria-label", `Picture with the query pixel: ${pixel}`);
}

function showPrediction() {
  const now = prediction();
  $("prediction-section").hidden = !view().classes;
  if (!now) {
    $("prediction").replaceChildren();
    $("prediction-note").textContent = state.image === "average" ? aboutTheAverage() : "";
    return;
  }
  const { classes, labels } = view();
  const label = Number.isInteger(state.image) ? labels[state.image] : -1;
  const order = [...now.keys()].sort((a, b) => now[b] - now[a]).slice(0, 4);
  $("prediction").replaceChildren(
    ...order.map((n) => {
      const item = element("li", {}, element("span", { textContent: classes[n] }), element("span", { textContent: percent(now[n]) }));
      item.style.setProperty("--share", percent(now[n]));
      if (n === label) item.className = "label";
      return item;
    }),
  );
  const touched = [];
  if (state.off.length) touched.push(`${state.off.length} ${state.off.length > 1 ? "heads" : "head"} off`);
  if (Object.keys(state.centers).length) touched.push(`${Object.keys(state.centers).length} moved`);
  const notes = [];
  if (label >= 0) notes.push(`Label: ${classes[label]}.`);
  if (touched.length && answer(state.run)) notes.push(`With ${touched.join(", ")}.`);
  if (touched.length && networks[state.run] === null) notes.push("The network is not part of this page, so the prediction stays.");
  if (isPast(state.run)) notes.push("The prediction is the trained network's, not this epoch's.");
  $("prediction-note").textContent = notes.join(" ");
}

/** Returns what is to be said while the average of images is shown. */
function aboutTheAverage() {
  const touched = state.off.length || Object.keys(state.centers).length;
  const stale = touched && view().layers.some(({ features }) => features);
  return `The average of images has no prediction.${stale ? " Layers see here what they saw before you changed heads." : ""}`;
}

/** Returns what is shown of the maps of the run, and of those beside it: sets of maps, with a title and a run each. */
function shownMaps(maps) {
  const first = { title: view().name, maps, run: state.run };
  if (!compared()) return [first];
  const second = { title: views[state.other].name, maps: allMaps(state.other), run: state.other };
  if (state.sides !== "difference") return [first, second];
  return [{ ...first, title: `${first.title} minus ${second.title}`, maps: differences(maps, second.maps) }];
}

/** Returns what the row of a layer is called: its place among all layers, where it has one. */
const rowName = ({ number }, n) => String(number >= 0 ? number : n);

function tilesOf(maps, width, top) {
  const [height, across] = maps.flat().find(Boolean)?.grid || [1, 1];
  return tiling(maps.length, Math.max(...maps.map((heads) => heads.length)), width, height / across, top);
}

function showMaps(shown, colors) {
  $("introduction").hidden = onlyMoments(state.run);
  $("introduction").textContent =
    `The network sees the picture as a grid of ${finestGrid().join("\u00d7")} pixels. From the one that you choose, the query, ` +
    "each map shows how a head shares out its attention, 100% in all.";
  $("other-figure").hidden = shown.length < 2;
  ["maps", "other-maps"].slice(0, shown.length).forEach((id, n) => {
    const canvas = $(id);
    const { maps, run } = shown[n];
    const tiles = tilesOf(maps, canvas.clientWidth);
    canvas.style.height = `${tiles.height}px`;
    const chosen = n ? null : [state.layer, state.head];
    const pen = canvasPen(canvas, canvas.clientWidth, tiles.height);
    drawMaps(pen, maps, tiles, colors, ground(run, colors), views[run].layers.map(rowName), chosen);
    Object.assign(canvas, { tiles, maps, run });
    canvas.setAttribute("aria-label", `Attention of all heads of ${shown[n].title}, a row for each layer; the table below has the numbers`);
    $(n ? "other-caption" : "maps-caption").textContent = captionOf(shown[n]);
  });
  showTraining();
}

function captionOf({ title, maps }) {
  const all = maps.flat();
  if (all.some((map) => map?.signed)) return `${title} (orange: more; blue: less)`;
  if (all.some((map) => map?.past)) return `${title}: its maps at this epoch were not kept`;
  if (!all.some(Boolean)) return `${title}: these heads cannot be compared`;
  if (all.some((map) => map?.values === null)) return `${title}: its maps of this picture are not known here`;
  return compared() ? title : "A row for each layer; each head on its own scale";
}

function showTraining() {
  const { history, step } = view();
  $("training").hidden = places(view()) < 2;
  $("training-note").textContent = "";
  if ($("training").hidden) return;
  const last = places(view()) - 1;
  const at = state.epoch < 0 ? last : state.epoch;
  const [unit, counts] = history.epoch ? ["Epoch", history.epoch] : ["Step", history.step];
  $("epoch").max = last;
  $("epoch").value = at;
  $("epoch-output").textContent = at < counts.length ? `${unit} ${counts[at]} of ${counts[counts.length - 1]}` : `Checkpoint, step ${step}`;
  $("epoch").setAttribute("aria-valuetext", $("epoch-output").textContent);
  if (!isPast(state.run)) return;
  if (history.mean_shift)
    $("training-note").textContent =
      "These heads look where the image says, and their maps at this epoch were not kept. Each ellipse and cross is of the shift that a head attended to, averaged over images and over all queries, those at the border too; the checkpoint's are of this query.";
  else if (hasContent(view())) $("training-note").textContent = "Maps of the positional part alone at this epoch.";
}

/** Shows a head: its map, or the difference to another run's, and the facts about it. */
function showHead(map, shown, colors) {
  const { layers } = view();
  const parameters = currentParameters(state.run, state.layer);
  const canvas = $("large");
  const width = canvas.clientWidth;
  const height = (width * map.grid[0]) / map.grid[1];
  canvas.style.aspectRatio = `${map.grid[1]} / ${map.grid[0]}`;
  const drawn = shown || { ...map, values: null, P: null, outline: null }; // null: the other run has no such head
  const backdrop = ground(state.run, colors);
  drawMap(canvasPen(canvas, width, height), drawn, 0, 0, width, height, colors, backdrop, { contours: state.outlines, thickness: 1.5 });
  canvas.map = drawn;
  fill($("layer"), layers.map(({ name }) => name), state.layer);
  fill($("head"), Array.from({ length: headsOf(layers[state.layer].parameters) }, (_, n) => `Head ${n}`), state.head);
  $("on").checked = !map.off;
  $("surgery").hidden = !view().classes;
  canvas.setAttribute("aria-label", `${layers[state.layer].name}, head ${state.head}, enlarged`);
  const keys = canMove() ? " Drag the cross, or press Shift and an arrow key, to move the head's center." : "";
  $("large-help").textContent = drawn.values ? `Point at a pixel, or press the arrow keys, to read it.${keys}` : "";
  $("legend").textContent = legendOf(drawn);
  showFacts(map, parameters);
}

/** Returns what the lines over a large map are. */
function legendOf({ P, outline, values, scores, signed: isDifference, off }) {
  if (off) return "This head is off.";
  const lines = [];
  if (values && !isDifference) {
    const [least, greatest] = extremes(values);
    lines.push(scores ? `Colour: scores from ${signed(least)} to ${signed(greatest)}.` : `Colour: probabilities from 0 to ${greatest.toPrecision(2)}.`);
  }
  if (state.outlines && P) lines.push("Solid line: the fewest pixels with half of the probability; dashed: with nine tenths.");
  if (outline) lines.push("Cross: the head's center, or mean shift; ellipse: what holds half of a Gaussian with its spread.");
  return lines.join(" ");
}

/** Returns whether the head is a Gaussian whose center can be moved now. */
const canMove = () => state.epoch < 0 && gaussianOf(view().layers[state.layer].parameters, state.head) !== null;

/** Returns the facts about a head of the first run: [name, text] each. */
function factsOf(map, parameters, head) {
  if (map.past) return [["Mean shift, all queries", inWords(map.outline.center)]];
  if (!map.P) return [["Map", "not known of this picture"]];
  const found = measures(map.whole);
  const gaussian = gaussianOf(parameters, head);
  const facts = [
    gaussian ? ["Center", inWords(gaussian.center)] : ["Mean shift", inWords(found.mean)],
    ["Peak", `${found.peak.toFixed(3)}, ${inWords(found.peakShift)}`],
    ["Entropy", `${found.entropy.toFixed(2)} nats`],
    ["Within 3\u00d73", percent(found.mass[3])],
    ["Within 5\u00d75", percent(found.mass[5])],
  ];
  const gate = gateOf(parameters, head);
  if (gate !== undefined) facts.push(["Gate to position", percent(gate)]);
  return facts;
}

function showFacts(map, parameters) {
  const facts = factsOf(map, parameters, state.head);
  if (compared()) facts.unshift(["Run", view().name]);
  $("facts").replaceChildren(
    ...facts.flatMap(([name, text]) => [element("dt", { textContent: name }), element("dd", { textContent: text })]),
  );
}

/** Puts options into a select, where they are not there yet. */
function fill(select, names, chosen) {
  const [wanted, there] = [names.join("\n"), [...select.options].map((option) => option.text).join("\n")];
  if (wanted !== there) select.replaceChildren(...names.map((name, n) => new Option(name, n)));
  select.value = chosen;
}

/**
 * Shows the convolution that the layer is: of the checkpoint, whose value maps `gram` is of, in all parts of its scores,
 * without the heads that are off.
 */
function showTheorem(colors) {
  const { layers } = view();
  const layer = layers[state.layer];
  const on = Array.from({ length: headsOf(layer.parameters) }, (_, head) => head).filter((head) => !isOff(state.run, state.layer, head));
  const sharpness = 2 ** state.sharpness;
  const parameters = movedParameters(state.run, state.layer);
  const options = { sharpness, part: "total" };
  const P = layer.gram ? on.map((head) => averaged(probabilities, state.run, state.layer, head, parameters, options)) : [];
  $("theorem-section").hidden = !P.length || P.includes(null);
  if ($("theorem-section").hidden) return;
  const gram = on.flatMap((head) => on.map((other) => layer.gram[head * layer.gram.shape[1] + other]));
  const energy = energies(P, gram);
  showKernel(layer, energy, on.length, colors);
  const { query, grid } = padded(layer);
  const sides = [1, 3, 5, 7].filter((side) => side <= 2 * Math.max(...grid));
  const row = (tag, first, cells) => element("tr", {}, element("th", { textContent: first, scope: tag === "th" ? "col" : "row" }), ...cells.map((textContent) => element(tag, { textContent })));
  $("shares").tHead.replaceChildren(row("th", "Window", sides.map((side) => `${side}\u00d7${side}`)));
  const shares = (of) => sides.map((side) => percent(windowShare(of, query, grid, side)));
  $("shares").tBodies[0].replaceChildren(
    row("td", "Share of the energy", shares(energy)),
    row("td", "Share of the pixels", shares(energy.map(() => 1))),
  );
  $("sharpness").value = state.sharpness;
  $("sharpness-output").textContent = sharpness < 10 ? sharpness.toFixed(2) : sharpness.toFixed(0);
  const distance = distanceToTaps(P, gram);
  $("distance").textContent = 0 < distance && distance < 1e-6 ? "below 1e-6" : distance.toPrecision(3);
  $("distance-line").hidden = isMean(layer); // a mean of sharp maps is no single tap
}

/** Returns whether what is shown of a layer is a mean over images that it sees differently. */
const isMean = (layer) => state.image === "average" && Boolean(layer.features || layer.parameters.maps?.shape[0] > 1);

/** Returns whether a layer's heads look where the image says. */
const seesContent = (layer) => Boolean(layer.features || layer.parameters.encoding === "maps");

/** Draws the size of a layer's kernel by shift, over its `heads` that are on, and says in words what it is. */
function showKernel(layer, energy, heads, colors) {
  const { grid } = layer;
  const canvas = $("kernel");
  const width = canvas.clientWidth;
  const height = (width * grid[0]) / grid[1];
  const sizes = Float32Array.from(energy, (value) => Math.sqrt(Math.max(value, 0)));
  const drawn = { values: cropped(sizes, padded(layer).grid, layer.padding), grid, query: queryOn(layer) };
  drawMap(canvasPen(canvas, width, height), drawn, 0, 0, width, height, colors, null, { thickness: 2 });
  canvas.style.aspectRatio = `${grid[1]} / ${grid[0]}`;
  $("kernel-caption").textContent = `${layer.name}: size of the kernel by shift`;
  const which = heads < headsOf(layer.parameters) ? " that are on" : "";
  const kernel = `the kernel \u03a3 A[shift] W over its ${heads} heads${which}`;
  $("theorem-text").textContent = [
    !seesContent(layer)
      ? `At this query the layer is a convolution with ${kernel}. Away from the border the kernel is the same at each pixel.`
      : isMean(layer)
      ? `Over the images, the layer weighs pixels at this query by ${kernel}, in the mean. Its heads look where the image says, so it is no convolution.`
      : `At this query of this image the layer weighs pixels by ${kernel}. Its heads look where the image says: at another pixel or image the kernel is another, and the layer is no convolution.`,
    state.part !== "total" && !isPast(state.run) ? "Position and content count together here." : [],
    isPast(state.run) ? "It is the trained network's, not this epoch's." : [],
  ].flat().join(" ");
  $("theorem-title").textContent = seesContent(layer) ? "The kernel at this query" : "The convolution in it";
  $("distance-name").textContent = seesContent(layer) ? "Relative distance to one pixel a head, at this query" : "Relative distance to a convolution with one pixel a head";
}

/** Updates what screen readers are told: a sentence on the head, and the table. */
function showForReaders() {
  const { layers } = view();
  if (!layers.length) return;
  const describe = (n, head, parameters) => factsOf(headMap(state.run, n, head, { parameters }), parameters, head);
  const chosen = Object.fromEntries(describe(state.layer, state.head, currentParameters(state.run, state.layer)));
  const moments = onlyMoments(state.run);
  const shift = chosen[moments ? "Mean shift, all queries" : "Mean shift"];
  const center = chosen.Center ? `center ${chosen.Center}` : `mean shift ${shift}`;
  $("table-title").textContent = moments ? "Table of the heads, over images and all queries" : "Table of the heads at this query";
  const within = chosen["Within 3\u00d73"];
  const words = chosen.Map ? `map ${chosen.Map}` : within ? `${center}; ${within} within 3x3` : center;
  $("sentence").textContent = `${layers[state.layer].name}, head ${state.head}: ${words}.`;
  const rows = layers.flatMap((layer, n) => {
    const parameters = currentParameters(state.run, n);
    return Array.from({ length: headsOf(parameters) }, (_, head) => [`${layer.name}, head ${head}`, describe(n, head, parameters)]);
  });
  const cell = (tag, textContent, scope) => element(tag, scope ? { textContent, scope } : { textContent });
  const names = rows[0][1].map(([name]) => name);
  $("table").tHead.replaceChildren(element("tr", {}, cell("th", "Head", "col"), ...names.map((name) => cell("th", name, "col"))));
  $("table").tBodies[0].replaceChildren(
    ...rows.map(([name, facts]) => element("tr", {}, cell("th", name, "row"), ...facts.map(([, text]) => cell("td", text)))),
  );
}
