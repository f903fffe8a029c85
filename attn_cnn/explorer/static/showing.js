"use strict";
/** What the page shows of the state: `show` draws all of it, `change` changes the state and draws before the next frame. */

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share < 0.0995 ? 1 : 0)}%`;
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

let shownGround = {}; // the pale picture behind the maps, and what it was made of
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
  showChoices();
  showPicture(colors);
  showPrediction();
  if (view().layers.length) {
    const maps = allMaps(state.run);
    showMaps(maps, colors);
    showHead(maps[state.layer][state.head], colors);
    showTheorem(maps[state.layer], colors);
  }
  soon("address", 250, () => history.replaceState(null, "", `#${stateText()}`));
  soon("reader", 350, showForReaders);
}

const timers = {};

/** Calls a function once nothing has asked for it for so many milliseconds. */
function soon(name, milliseconds, call) {
  clearTimeout(timers[name]);
  timers[name] = setTimeout(call, milliseconds);
}

/** Returns the pale picture that maps lie on; null where a run has none. */
function ground(colors) {
  const drawn = picture();
  if (!drawn) return null;
  const key = [state.run, state.image, colors.dark, state.image === "own" ? live.version : 0].join();
  if (shownGround.key !== key) shownGround = { key, canvas: backdrop(drawn, view().images.shape.slice(1), colors) };
  return shownGround.canvas;
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
  $("restore").disabled = !state.off.length && !Object.keys(state.centers).length;
}

function check(group, value) {
  for (const input of $(group).querySelectorAll("input")) input.checked = input.value === String(value);
}

function showPicture(colors) {
  const canvas = $("picture");
  const width = canvas.clientWidth;
  const pen = canvasPen(canvas, width, width);
  const drawn = picture();
  if (drawn) pen.picture(inColor(drawn, view().images.shape.slice(1)), 0, 0, width, width);
  else pen.rectangle(0, 0, width, width, colors.dark ? "#2a2e36" : "#efece7");
  if (!view().layers.length) return;
  const [rows, columns] = finestGrid();
  drawQuery(pen, ([x, y]) => [(x * width) / columns, (y * width) / rows], state.query, 2);
  const pixel = `row ${state.query[0] + 1} of ${rows}, column ${state.query[1] + 1} of ${columns}`;
  canvas.setAttribute("aria-label", `Picture with the query pixel: ${pixel}`);
}

function showPrediction() {
  const now = prediction();
  $("prediction-section").hidden = !view().classes;
  if (!now) {
    $("prediction").replaceChildren();
    const reason = networks[state.run] ? "" : "The network is not part of this page (--weights).";
    $("prediction-note").textContent = state.image === "average" ? "The average of images has no prediction." : reason;
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
  const truth = label >= 0 ? `Label: ${classes[label]}.` : "";
  const now_ = touched.length && live.result ? `With ${touched.join(", ")}.` : "";
  const cannot = touched.length && !networks[state.run] ? "The network is not part of this page (--weights), so the prediction stays." : "";
  $("prediction-note").textContent = [truth, now_, cannot].filter(Boolean).join(" ");
}

/** Returns what the figure shows of the maps of the run, and of those beside it: sets of maps, with a title each. */
function shownMaps(maps) {
  const name = view().name;
  if (!compared()) return [{ title: name, maps }];
  const other = allMaps(state.other);
  const otherName = views[state.other].name;
  if (state.sides === "difference") return [{ title: `${name} minus ${otherName}`, maps: differences(maps, other) }];
  return [{ title: name, maps }, { title: otherName, maps: other }];
}

function tilesOf(maps, width, top) {
  const [height, across] = maps.flat().find(Boolean)?.grid || [1, 1];
  return tiling(maps.length, Math.max(...maps.map((heads) => heads.length)), width, height / across, top);
}

function showMaps(maps, colors) {
  const shown = shownMaps(maps);
  $("other-figure").hidden = shown.length < 2;
  ["maps", "other-maps"].slice(0, shown.length).forEach((id, n) => {
    const canvas = $(id);
    const tiles = tilesOf(shown[n].maps, canvas.clientWidth);
    canvas.style.height = `${tiles.height}px`;
    const run = n ? state.other : state.run;
    drawMaps(canvasPen(canvas, canvas.clientWidth, tiles.height), shown[n].maps, tiles, colors, ground(colors), n ? null : [state.layer, state.head]);
    Object.assign(canvas, { tiles, maps: shown[n].maps, run });
    canvas.setAttribute("aria-label", `Attention of all heads of ${shown[n].title}, a row for each layer; the table below has the numbers`);
    const scale = shown[n].maps.flat().some((map) => map?.signed) ? " (orange: more; blue: less)" : "";
    $(n ? "other-caption" : "maps-caption").textContent = shown.length > 1 || compared() ? shown[n].title + scale : "A row for each layer; each head on its own scale";
  });
  showTraining();
}

function showTraining() {
  const { history } = view();
  $("training").hidden = !history;
  if (!history) return;
  const length = historyLength(history);
  const at = state.epoch < 0 ? length - 1 : state.epoch;
  const [unit, counts] = history.epoch ? ["Epoch", history.epoch] : ["Step", history.step];
  $("epoch").max = length - 1;
  $("epoch").value = at;
  $("epoch-output").textContent = `${unit} ${counts[at]} of ${counts[length - 1]}`;
  $("epoch").setAttribute("aria-valuetext", $("epoch-output").textContent);
  const past = state.epoch >= 0;
  let note = "";
  if (past && history.mean_shift) note = "These heads look where the image says: the maps are the checkpoint's, the outlines those of this epoch.";
  else if (past && hasContent(view())) note = "Maps of the positional part alone at this epoch.";
  $("training-note").textContent = note;
}

function showHead(map, colors) {
  const { layers } = view();
  const parameters = currentParameters(state.run, state.layer);
  const canvas = $("large");
  const width = canvas.clientWidth;
  const height = (width * map.grid[0]) / map.grid[1];
  canvas.style.aspectRatio = `${map.grid[1]} / ${map.grid[0]}`;
  let drawn = map;
  if (compared() && state.sides === "difference") {
    const all = differences([[map]], [[otherHead()]]);
    drawn = all[0][0] || map;
  }
  drawMap(canvasPen(canvas, width, height), drawn, 0, 0, width, height, colors, ground(colors), { contours: state.outlines, thickness: 1.5 });
  canvas.map = map;
  fill($("layer"), layers.map(({ name }) => name), state.layer);
  fill($("head"), Array.from({ length: headsOf(layers[state.layer].parameters) }, (_, n) => `Head ${n + 1}`), state.head);
  $("on").checked = !map.off;
  $("surgery").hidden = !view().classes;
  canvas.setAttribute("aria-label", `${layers[state.layer].name}, head ${state.head + 1}, enlarged`);
  $("large-help").textContent = canMove() ? "Drag the cross to move the head's center, or use the arrow keys." : "";
  showFacts(map, parameters);
}

function otherHead() {
  const layer = views[state.other].layers[state.layer];
  return layer && state.head < headsOf(layer.parameters) ? headMap(state.other, state.layer, state.head) : null;
}

/** Returns whether the head is a Gaussian whose center can be moved now. */
const canMove = () => state.epoch < 0 && gaussianOf(view().layers[state.layer].parameters, state.head) !== null;

/** Returns the facts about a head: [name, text] each. */
function factsOf(map, parameters, head) {
  const found = measures(map.P, map.query, map.grid);
  const gaussian = gaussianOf(parameters, head);
  const facts = [
    gaussian ? ["Center", inWords(gaussian.center)] : ["Mean shift", inWords(found.mean)],
    ["Peak", `${found.peak.toFixed(3)}, ${inWords(found.peakShift)}`],
    ["Entropy", `${found.entropy.toFixed(2)} nats`],
    ["Within 3\u00d73", percent(found.mass[3])],
    ["Within 5\u00d75", percent(found.mass[5])],
  ];
  if (parameters.gates) facts.push(["Gate to position", percent(gateOf(parameters, head))]);
  return facts;
}

function showFacts(map, parameters) {
  const facts = factsOf(map, parameters, state.head);
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

function showTheorem(asTheyAre, colors) {
  const layer = view().layers[state.layer];
  $("theorem-section").hidden = !layer.gram;
  if (!layer.gram) return;
  const [heads, sharpness] = [headsOf(layer.parameters), 2 ** state.sharpness];
  const parameters = currentParameters(state.run, state.layer);
  const sharp = (_, head) => headMap(state.run, state.layer, head, { parameters, sharpness });
  const maps = sharpness === 1 ? asTheyAre : Array.from({ length: heads }, sharp);
  const P = maps.map((map) => map.P);
  const energy = energies(P, layer.gram);
  const { grid, query } = maps[0];
  const canvas = $("kernel");
  const width = canvas.clientWidth;
  const drawn = { values: energy.map((value) => Math.sqrt(Math.max(value, 0))), grid, query };
  drawMap(canvasPen(canvas, width, (width * grid[0]) / grid[1]), drawn, 0, 0, width, (width * grid[0]) / grid[1], colors, null, { thickness: 2 });
  canvas.style.aspectRatio = `${grid[1]} / ${grid[0]}`;
  $("kernel-caption").textContent = `${layer.name}: size of the kernel by shift`;
  const content = layer.features || layer.parameters.encoding === "maps";
  $("theorem-text").textContent =
    `At this query the layer is a convolution with the kernel \u03a3 A[shift] W over its ${heads} heads. ` +
    (content
      ? "Its heads look where the image says, so the kernel is another at each pixel."
      : "Away from the border the kernel is the same at each pixel.");
  const sides = [1, 3, 5, 7].filter((side) => side <= 2 * Math.max(...grid));
  const row = (tag, first, cells) => element("tr", {}, element("th", { textContent: first, scope: tag === "th" ? "col" : "row" }), ...cells.map((textContent) => element(tag, { textContent })));
  $("shares").tHead.replaceChildren(row("th", "Window", sides.map((side) => `${side}\u00d7${side}`)));
  $("shares").tBodies[0].replaceChildren(row("td", "Share of the energy", sides.map((side) => percent(windowShare(energy, query, grid, side)))));
  $("sharpness").value = state.sharpness;
  $("sharpness-output").textContent = sharpness < 10 ? sharpness.toFixed(2) : sharpness.toFixed(0);
  $("distance").textContent = distanceToTaps(P, layer.gram).toPrecision(3);
}

/** Updates what screen readers are told: a sentence on the head, and the table. */
function showForReaders() {
  const { layers } = view();
  if (!layers.length) return;
  const describe = (n, head, parameters) => factsOf(headMap(state.run, n, head, { parameters }), parameters, head);
  const chosen = Object.fromEntries(describe(state.layer, state.head, currentParameters(state.run, state.layer)));
  const center = chosen.Center ? `center ${chosen.Center}` : `mean shift ${chosen["Mean shift"]}`;
  $("sentence").textContent = `${layers[state.layer].name}, head ${state.head + 1}: ${center}; ${chosen["Within 3\u00d73"]} within 3x3.`;
  const rows = layers.flatMap((layer, n) => {
    const parameters = currentParameters(state.run, n);
    return Array.from({ length: headsOf(parameters) }, (_, head) => [`${layer.name}, head ${head + 1}`, describe(n, head, parameters)]);
  });
  const cell = (tag, textContent, scope) => element(tag, scope ? { textContent, scope } : { textContent });
  const names = rows[0][1].map(([name]) => name);
  $("table").tHead.replaceChildren(element("tr", {}, cell("th", "Head", "col"), ...names.map((name) => cell("th", name, "col"))));
  $("table").tBodies[0].replaceChildren(
    ...rows.map(([name, facts]) => element("tr", {}, cell("th", name, "row"), ...facts.map(([, text]) => cell("td", text)))),
  );
}
