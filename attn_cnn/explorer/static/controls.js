"use strict";
/** The page's controls, which change the state, and its start. */

let drawing = false; // whether strokes in the picture paint
let stroke = [0, 0]; // where the last one was
let pinned = false; // whether hovering leaves the query where it is
let ticking = 0; // the timer that plays the training

/** Takes the state from the page's address; a query that stands there is pinned. */
function readAddress() {
  const text = location.hash.slice(1);
  readState(text);
  pinned = new URLSearchParams(text).has("query");
}

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
    if (value !== "own") stopDrawing();
    notice("");
    ask({ image: /^\d+$/.test(value) ? Number(value) : value });
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
    let caption = `image ${n}`;
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
    const average = inColor(picture(state.run, "average"), images.shape.slice(1));
    addImage("average", "average").querySelector("canvas").getContext("2d").drawImage(average, 0, 0);
  }
  live.own = null;
  stopDrawing();
  $("images-hint").textContent = shipped ? "Below each, what the trained network says; \u2717 where it is wrong." : "";
  $("own").hidden = $("own-hint").hidden = !networks[state.run];
  $("images-section").hidden = count < 2 && !networks[state.run];
  for (const id of ["heads-section", "head-section", "theorem-section", "saving", "details"]) $(id).hidden = !layers.length;
  document.querySelector("main").className = layers.length ? "" : "headless";
  $("title").textContent = layers.length ? "Where each head looks" : "What the network says";
  $("picture-title").textContent = layers.length ? "Query pixel" : "Picture";
}

/** Returns the pixel of a grid at shares of its height and width. */
function pixelAt(down, right, [rows, columns]) {
  const at = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return [at(down, rows), at(right, columns)];
}

/** Returns the pixel of a grid that a pointer is on. */
function pixelUnder(event, grid) {
  const { left, top, width, height } = event.currentTarget.getBoundingClientRect();
  return pixelAt((event.clientY - top) / height, (event.clientX - left) / width, grid);
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** Calls a function with the step, [rows, columns], of each arrow key that is pressed on an element, and whether with Shift. */
function onArrows(target, call) {
  target.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    call(ARROWS[event.key], event.shiftKey);
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

/** Paints a soft white line from where the pointer was last into the person's own picture. */
function paint(event) {
  const [height, width, channels] = view().images.shape.slice(1);
  const box = event.currentTarget.getBoundingClientRect();
  const to = [((event.clientY - box.top) * height) / box.height, ((event.clientX - box.left) * width) / box.width];
  const from = event.type === "pointerdown" ? to : stroke;
  stroke = to;
  const own = Uint8Array.from(live.own);
  const radius = Math.max(width / 12, 1.3);
  for (let n = 0; n < height * width; n++) {
    const distance = distanceToLine([Math.floor(n / width) + 0.5, (n % width) + 0.5], from, to);
    const ink = 255 * Math.min(1, Math.max(0, 1.5 - distance / radius));
    for (let c = 0; c < channels; c++) own[n * channels + c] = Math.max(own[n * channels + c], ink);
  }
  showOwn(own);
}

/** Returns how far a point is from the line between two others. */
function distanceToLine([y, x], [y0, x0], [y1, x1]) {
  const squared = (y1 - y0) ** 2 + (x1 - x0) ** 2;
  const along = squared ? Math.min(1, Math.max(0, ((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / squared)) : 0;
  return Math.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0));
}

function stopDrawing() {
  drawing = false;
  $("draw").setAttribute("aria-pressed", false);
  $("picture").classList.remove("drawing");
  $("own-hint").textContent = "Drop or paste any picture.";
}

function startDrawing() {
  drawing = true;
  $("draw").setAttribute("aria-pressed", true);
  $("picture").classList.add("drawing");
  $("own-hint").textContent = "Draw on the picture.";
  notice("");
  showOwn(new Uint8Array(view().images.shape.slice(1).reduce((a, b) => a * b)));
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
    const key = pixelAt((event.clientY - box.top - y) / height, (event.clientX - box.left - x) / width, map.grid);
    showPointer(map, key, `${views[canvas.run].layers[found[0]].name}, head ${found[1]}: `);
  });
  onArrows(canvas, ([rows, columns]) => change({ layer: state.layer + rows, head: state.head + columns }));
}

/** Says what lies under the pointer: the shift, and the number there. */
function showPointer(map, [k, l], whose = "") {
  if (!map.values) return;
  const value = map.values[k * map.grid[1] + l];
  const where = inWords([k - map.query[0], l - map.query[1]]);
  const what = map.signed ? "difference" : state.values === "scores" ? "score" : "probability";
  $("pointer").textContent = `${whose}${where}: ${what} ${state.values === "scores" || map.signed ? signed(value) : value.toPrecision(3)}`;
}

function listenToHead() {
  const canvas = $("large");
  let dragged = false;
  let key = null; // the pixel that the arrow keys read
  const name = () => `${state.layer}:${state.head}`;
  const center = () => gaussianOf(currentParameters(state.run, state.layer), state.head).center;
  const move = (to) => {
    const { grid, query } = canvas.map; // off the grid the center could not be dragged back
    const center = to.map((value, axis) => +Math.min(Math.max(value, -0.5 - query[axis]), grid[axis] - 0.5 - query[axis]).toFixed(3));
    ask({ centers: { ...state.centers, [name()]: center } });
  };
  const under = (event) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const { grid, query } = canvas.map;
    return [((event.clientY - top) / height) * grid[0] - query[0] - 0.5, ((event.clientX - left) / width) * grid[1] - query[1] - 0.5];
  };
  const isNear = (event) => {
    if (!canMove()) return false;
    const [at, now] = [under(event), center()];
    return Math.hypot(at[0] - now[0], at[1] - now[1]) <= (24 * canvas.map.grid[1]) / canvas.clientWidth;
  };
  // A finger on the center drags it instead of the page.
  canvas.addEventListener("touchstart", (event) => isNear(event.touches[0]) && event.preventDefault(), { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    showPointer(canvas.map, pixelUnder(event, canvas.map.grid));
    dragged = isNear(event);
    if (!dragged) return;
    canvas.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged) return move(under(event));
    showPointer(canvas.map, pixelUnder(event, canvas.map.grid));
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (dragged = false));
  onArrows(canvas, (step, shift) => {
    if (shift) return canMove() && move(center().map((value, axis) => value + step[axis] / 4));
    const { grid, query } = canvas.map;
    key = (key || query).map((at, axis) => Math.min(Math.max(at + step[axis], 0), grid[axis] - 1));
    showPointer(canvas.map, key);
  });
}

function listenToOwn() {
  $("pick").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => $("file").files[0] && openPicture($("file").files[0]));
  $("draw").addEventListener("click", () => (drawing ? stopDrawing() : startDrawing()));
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
  const last = () => places(view()) - 1;
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
    stopPlaying();
    Object.assign(state, { run: Number($("run").value), off: [], centers: {}, epoch: -1, image: state.image === "own" ? 0 : state.image });
    keepInRange();
    buildImages();
    recompute();
  });
  $("other").addEventListener("change", () => ask({ other: Number($("other").value) }));
  $("outlines").addEventListener("change", () => change({ outlines: $("outlines").checked }));
  $("layer").addEventListener("change", () => change({ layer: Number($("layer").value) }));
  $("head").addEventListener("change", () => change({ head: Number($("head").value) }));
  $("sharpness").addEventListener("input", () => change({ sharpness: Number($("sharpness").value) }));
  $("on").addEventListener("change", () => {
    const name = `${state.layer}:${state.head}`;
    ask({ off: $("on").checked ? state.off.filter((other) => other !== name) : [...state.off, name] });
  });
  $("restore").addEventListener("click", () => ask({ off: [], centers: {} }));
  $("save-png").addEventListener("click", async () => save(await asPng(), "image/png", "png"));
  $("save-svg").addEventListener("click", () => save(asSvg(), "image/svg+xml", "svg"));
  $("save-csv").addEventListener("click", () => save(asCsv(), "text/csv", "csv"));
  $("copy").addEventListener("click", async () => {
    showAddress();
    try {
      await navigator.clipboard.writeText(location.href);
      $("saved").textContent = "The link is copied.";
    } catch {
      $("saved").textContent = "The address of this page is the link.";
    }
  });
  window.addEventListener("hashchange", () => {
    stopPlaying();
    readAddress();
    buildImages();
    recompute();
  });
  window.addEventListener("resize", () => change({}));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => change({}));
}

async function start() {
  views = await readDocument("view");
  networks = views.map(() => undefined); // not read yet
  readAddress();
  $("copy").hidden = !hasAddress;
  $("run").replaceChildren(...views.map(({ name }, n) => new Option(name, n)));
  $("other").replaceChildren(new Option("none", -1), ...views.map(({ name }, n) => new Option(name, n)));
  $("run-field").hidden = $("other-field").hidden = views.length < 2;
  choices("values", [["probabilities", "Probabilities"], ["scores", "Scores"]], (values) => change({ values }));
  choices("part", [["total", "Total"], ["position", "Position"], ["content", "Content"]], (part) => change({ part }));
  choices("sides", [["beside", "Side by side"], ["difference", "Difference"]], (sides) => change({ sides }));
  buildImages();
  show();
  performance.mark("first view");
  for (const listen of [listenToPicture, listenToHead, listenToOwn, listenToTraining, listenToRest]) listen();
  for (const canvas of [$("maps"), $("other-maps")]) listenToMaps(canvas);
  networks = await readDocument("networks");
  buildImages();
  recompute();
  document.body.dataset.ready = "true";
}

start().catch((error) => {
  $("about").textContent = `This browser cannot show the page: ${error.message}`;
  throw error;
});
