"use strict";
/** The page's controls: they change the state, and `show` draws what follows from it. */

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

// What is shown

let drawing = false; // whether strokes in the picture paint
let pinned = false; // whether hovering leaves the query where it is
let ticking = 0; // the timer that plays the training
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

// The network

let computing = 0; // counts computations, so that an old one stops when a new one begins

/** Computes the network anew where the picture or the heads are not those that the page came with. */
async function recompute() {
  const mine = ++computing;
  const touched = state.image === "own" || state.off.length || Object.keys(state.centers).length;
  const current = picture();
  if (!touched || !networks[state.run] || !current || state.image === "average") {
    if (live.result) live.result = null;
    $("progress").hidden = true;
    return change({});
  }
  const result = await inSlices(predictor(current), () => mine === computing);
  if (mine !== computing) return;
  live.result = result;
  change({});
}

/** Returns the computation of the network for pixels, with the heads as they are now. */
function predictor(current) {
  const { images, layers, mean, std } = view();
  const shown = layers.map((layer, n) => ({ ...layer, parameters: state.epoch < 0 ? currentParameters(state.run, n) : layer.parameters }));
  return runNetwork(networks[state.run], shown, normalised(current, images.shape.slice(1), mean, std), new Set(state.off));
}

const SLICE = 40; // milliseconds

/** Runs a generator in slices, with a progress bar where it takes more than one; null if it is no longer `wanted`. */
async function inSlices(generator, wanted) {
  let start = performance.now();
  for (;;) {
    const { done, value } = generator.next();
    if (done) {
      $("progress").hidden = true;
      return value;
    }
    if (performance.now() - start < SLICE) continue;
    $("progress").hidden = false;
    $("progress").value = value;
    await new Promise((go) => setTimeout(go));
    if (!wanted()) return null;
    start = performance.now();
  }
}

function touch(changes) {
  change(changes);
  recompute();
}

/** Makes a picture the person's own: pixels of the size that the network takes. */
function showOwn(own) {
  live.own = own;
  live.version = (live.version || 0) + 1;
  if (!$("images").querySelector('[value="own"]')) addImage("own", "yours");
  const canvas = $("images").querySelector('[value="own"]').parentNode.querySelector("canvas");
  canvas.getContext("2d").drawImage(inColor(own, view().images.shape.slice(1)), 0, 0);
  touch({ image: "own" });
}

async function openPicture(file) {
  if (!networks[state.run]) return say("The network is not part of this page; make it with --weights to try pictures of your own.");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return say(`${file.name || "That"} is no picture that this browser reads.`);
  }
  const canvas = element("canvas", { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  showOwn(fitted(canvas.getContext("2d").getImageData(0, 0, bitmap.width, bitmap.height), view().images.shape.slice(1)));
  say("");
}

function say(words) {
  $("own-hint").textContent = words || "Drop or paste any picture.";
}

// Controls

/** Builds a group of choices, of which one is checked. */
function choices(id, options, chosen) {
  $(id).replaceChildren(
    ...options.map(([value, name]) => {
      const input = element("input", { type: "radio", name: id, value });
      input.addEventListener("change", () => chosen(value));
      return element("label", {}, input, name);
    }),
  );
}

function addImage(value, caption, wrong = false) {
  const input = element("input", { type: "radio", name: "image", value });
  input.addEventListener("change", () => {
    touch({ image: /^\d+$/.test(value) ? Number(value) : value });
  });
  const { images } = view();
  const children = [input];
  if (images) {
    const [height, width] = images.shape.slice(1);
    children.push(element("canvas", { width, height }));
  }
  children.push(element("span", { textContent: caption, className: wrong ? "wrong" : "" }));
  const label = element("label", {}, ...children);
  $("images").append(label);
  return label;
}

function buildImages() {
  $("images").replaceChildren();
  const { images, labels, classes, probabilities: shipped, layers } = view();
  const count = images ? images.shape[0] : imageCount(view());
  for (let n = 0; n < count; n++) {
    let caption = `image ${n + 1}`;
    let wrong = false;
    if (shipped) {
      const now = shipped.subarray(n * classes.length, (n + 1) * classes.length);
      const best = now.indexOf(Math.max(...now));
      wrong = best !== labels[n];
      caption = `${classes[best]} ${percent(now[best])}`;
    }
    const label = addImage(String(n), caption, wrong);
    if (shipped) {
      label.title = `Label ${classes[labels[n]]}, predicted ${caption}`;
      label.querySelector("input").setAttribute("aria-label", label.title);
    }
    if (images) {
      const size = images.length / count;
      label.querySelector("canvas").getContext("2d").drawImage(inColor(images.subarray(n * size, (n + 1) * size), images.shape.slice(1)), 0, 0);
    }
  }
  if (images && count > 1) {
    const kept = state.image;
    state.image = "average";
    addImage("average", "average").querySelector("canvas").getContext("2d").drawImage(inColor(picture(), images.shape.slice(1)), 0, 0);
    state.image = kept;
  }
  live.own = live.result = null;
  $("own").hidden = $("own-hint").hidden = !networks[state.run];
  $("images-section").hidden = count < 2 && !networks[state.run];
  for (const id of ["heads-section", "head-section", "theorem-section", "saving", "details"]) $(id).hidden = !layers.length;
  document.querySelector("main").className = layers.length ? "" : "headless";
  $("title").textContent = layers.length ? "Where each head looks" : "What the network says";
  $("picture-title").textContent = layers.length ? "Query pixel" : "Picture";
  $("picture-help").hidden = !layers.length;
}

/** Returns the pixel of a grid that a pointer is on. */
function pixelUnder(event, [rows, columns]) {
  const { left, top, width, height } = event.currentTarget.getBoundingClientRect();
  const at = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return [at((event.clientY - top) / height, rows), at((event.clientX - left) / width, columns)];
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** Calls a function with the step, [rows, columns], of each arrow key that is pressed on an element. */
function onArrows(target, call) {
  target.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    call(ARROWS[event.key]);
  });
}

function listenToPicture() {
  const canvas = $("picture");
  canvas.addEventListener("pointermove", (event) => {
    if (drawing) return event.buttons && paint(event);
    if (event.pointerType === "mouse" && !pinned) change({ query: pixelUnder(event, finestGrid()) });
  });
  canvas.addEventListener("pointerdown", (event) => {
    if (drawing) {
      canvas.setPointerCapture(event.pointerId);
      return paint(event);
    }
    const query = pixelUnder(event, finestGrid());
    pinned = !(pinned && String(query) === String(state.query) && event.pointerType === "mouse");
    change({ query });
  });
  onArrows(canvas, ([rows, columns]) => {
    pinned = true;
    change({ query: [state.query[0] + rows, state.query[1] + columns] });
  });
}

/** Paints a soft white dot into the person's own picture. */
function paint(event) {
  const [height, width, channels] = view().images.shape.slice(1);
  const { left, top, width: wide } = event.currentTarget.getBoundingClientRect();
  const [y, x] = [((event.clientY - top) * height) / wide, ((event.clientX - left) * width) / wide];
  const own = Uint8Array.from(live.own);
  const radius = Math.max(width / 12, 1.3);
  for (let n = 0; n < height * width; n++) {
    const distance = Math.hypot(Math.floor(n / width) + 0.5 - y, (n % width) + 0.5 - x);
    const ink = 255 * Math.min(1, Math.max(0, 1.5 - distance / radius));
    for (let c = 0; c < channels; c++) own[n * channels + c] = Math.max(own[n * channels + c], ink);
  }
  showOwn(own);
}

function listenToMaps(canvas) {
  const head = (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    return canvas.tiles.find(event.clientX - left, event.clientY - top);
  };
  canvas.addEventListener("click", (event) => {
    const found = head(event);
    if (found && canvas.maps[found[0]][found[1]]) change({ layer: found[0], head: found[1] });
  });
  canvas.addEventListener("pointermove", (event) => {
    const found = head(event);
    const map = found && canvas.maps[found[0]]?.[found[1]];
    if (!map) return;
    const box = canvas.getBoundingClientRect();
    const [x, y, width, height] = canvas.tiles.at(...found);
    const at = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
    const key = [at((event.clientY - box.top - y) / height, map.grid[0]), at((event.clientX - box.left - x) / width, map.grid[1])];
    showPointer(map, key, `${views[canvas.run].layers[found[0]].name}, head ${found[1] + 1}: `);
  });
  onArrows(canvas, ([rows, columns]) => change({ layer: state.layer + rows, head: state.head + columns }));
}

/** Says what lies under the pointer: the shift, and the number there. */
function showPointer(map, [k, l], whose = "") {
  const value = map.values[k * map.grid[1] + l];
  const where = inWords([k - map.query[0], l - map.query[1]]);
  const what = map.signed ? "difference" : state.values === "scores" ? "score" : "probability";
  $("pointer").textContent = `${whose}${where}: ${what} ${state.values === "scores" || map.signed ? signed(value) : value.toPrecision(3)}`;
}

function listenToHead() {
  const canvas = $("large");
  let dragged = false;
  const name = () => `${state.layer}:${state.head}`;
  const center = () => gaussianOf(currentParameters(state.run, state.layer), state.head).center;
  const move = (to) => touch({ centers: { ...state.centers, [name()]: to.map((value) => +value.toFixed(3)) } });
  const under = (event) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const { grid, query } = canvas.map;
    return [((event.clientY - top) / height) * grid[0] - query[0] - 0.5, ((event.clientX - left) / width) * grid[1] - query[1] - 0.5];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (!canMove()) return;
    const [at, now] = [under(event), center()];
    const near = (24 * canvas.map.grid[1]) / canvas.clientWidth;
    dragged = Math.hypot(at[0] - now[0], at[1] - now[1]) <= near;
    if (!dragged) return;
    canvas.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged) return move(under(event));
    showPointer(canvas.map, pixelUnder(event, canvas.map.grid));
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (dragged = false));
  onArrows(canvas, (step) => {
    if (canMove()) move(center().map((value, axis) => value + step[axis] / 4));
  });
}

function listenToOwn() {
  $("pick").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => $("file").files[0] && openPicture($("file").files[0]));
  $("draw").addEventListener("click", () => {
    drawing = !drawing;
    $("draw").setAttribute("aria-pressed", drawing);
    $("picture").classList.toggle("drawing", drawing);
    say(drawing ? "Draw in the picture above." : "");
    if (drawing) showOwn(new Uint8Array(picture().length));
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (file) openPicture(file);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (event.dataTransfer.files[0]) openPicture(event.dataTransfer.files[0]);
  });
}

function stopPlaying() {
  clearInterval(ticking);
  ticking = 0;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-pressed", false);
}

function listenToTraining() {
  const last = () => historyLength(view().history) - 1;
  const choose = (epoch) => change({ epoch: epoch >= last() ? -1 : epoch });
  $("epoch").addEventListener("input", () => {
    stopPlaying();
    choose(Number($("epoch").value));
  });
  $("play").addEventListener("click", () => {
    if (ticking) return stopPlaying();
    let epoch = state.epoch < 0 ? 0 : state.epoch;
    choose(epoch);
    ticking = setInterval(() => {
      choose(++epoch);
      if (epoch >= last()) stopPlaying();
    }, Math.max(60, 6000 / last()));
    $("play").textContent = "Pause";
    $("play").setAttribute("aria-pressed", true);
  });
}

function listenToRest() {
  $("run").addEventListener("change", () => {
    Object.assign(state, { run: Number($("run").value), off: [], centers: {}, epoch: -1, image: state.image === "own" ? 0 : state.image });
    keepInRange();
    buildImages();
    recompute();
  });
  $("other").addEventListener("change", () => change({ other: Number($("other").value) }));
  $("outlines").addEventListener("change", () => change({ outlines: $("outlines").checked }));
  $("layer").addEventListener("change", () => change({ layer: Number($("layer").value) }));
  $("head").addEventListener("change", () => change({ head: Number($("head").value) }));
  $("sharpness").addEventListener("input", () => change({ sharpness: Number($("sharpness").value) }));
  $("on").addEventListener("change", () => {
    const name = `${state.layer}:${state.head}`;
    touch({ off: $("on").checked ? state.off.filter((other) => other !== name) : [...state.off, name] });
  });
  $("restore").addEventListener("click", () => touch({ off: [], centers: {} }));
  $("save-png").addEventListener("click", async () => save(await asPng(), "image/png", "png"));
  $("save-svg").addEventListener("click", () => save(asSvg(), "image/svg+xml", "svg"));
  $("save-csv").addEventListener("click", () => save(asCsv(), "text/csv", "csv"));
  $("copy").addEventListener("click", async () => {
    history.replaceState(null, "", `#${stateText()}`);
    try {
      await navigator.clipboard.writeText(location.href);
      $("saved").textContent = "The link is copied.";
    } catch {
      $("saved").textContent = "The address of this page is the link.";
    }
  });
  window.addEventListener("hashchange", () => {
    readState(location.hash.slice(1));
    buildImages();
    recompute();
  });
  window.addEventListener("resize", () => change({}));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => change({}));
}

async function start() {
  views = await readDocument("view");
  networks = views.map(() => null);
  readState(location.hash.slice(1));
  $("run").replaceChildren(...views.map(({ name }, n) => new Option(name, n)));
  $("other").replaceChildren(new Option("none", -1), ...views.map(({ name }, n) => new Option(name, n)));
  $("run-field").hidden = $("other-field").hidden = views.length < 2;
  choices("values", [["probabilities", "Probabilities"], ["scores", "Scores"]], (values) => change({ values }));
  choices("part", [["total", "Total"], ["position", "Position"], ["content", "Content"]], (part) => change({ part }));
  choices("sides", [["beside", "Side by side"], ["difference", "Difference"]], (sides) => change({ sides }));
  buildImages();
  show();
  performance.mark("first view");
  networks = await readDocument("networks");
  buildImages();
  listenToPicture();
  listenToMaps($("maps"));
  listenToMaps($("other-maps"));
  listenToHead();
  listenToOwn();
  listenToTraining();
  listenToRest();
  recompute();
  document.body.dataset.ready = "true";
}

start();
