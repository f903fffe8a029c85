"use strict";
/** The network at work: predictions of the current picture, which may be the person's own, with the heads as they are now. */

let computing = 0; // counts computations, so that an old one stops when a new one begins

/** Asks the networks of the runs that are shown, where the page did not come with the answer. */
async function recompute() {
  const mine = ++computing;
  for (const run of compared() ? [state.run, state.other] : [state.run]) {
    if (!mustAsk(run) || answer(run)) continue;
    const asked = question(run);
    const result = await inSlices(predictor(picture(run), run), () => mine === computing);
    if (mine !== computing) return;
    live.answers[run] = { ...result, question: asked };
  }
  $("progress").hidden = true;
  change({});
}

/** Returns whether a run's network is here, and is asked about another picture or other heads than the page came with. */
function mustAsk(run) {
  const touched = run === state.run && (state.off.length || Object.keys(state.centers).length);
  return Boolean(networks[run] && picture(run) && state.image !== "average" && (state.image === "own" || touched));
}

/** Returns the computation of a run's network for pixels, with the heads as they are now. */
function predictor(pixels, run = state.run) {
  const { images, layers, mean, std } = views[run];
  const shown = layers.map((layer, n) => ({ ...layer, parameters: movedParameters(run, n) }));
  const off = new Set(run === state.run ? state.off : []);
  return runNetwork(networks[run], shown, normalised(pixels, images.shape.slice(1), mean, std), off);
}

const SLICE = 40; // milliseconds

/** Runs a generator in slices, with a progress bar where it takes more than one; null if it is no longer `wanted`. */
async function inSlices(generator, wanted) {
  let start = performance.now();
  for (;;) {
    const { done, value } = generator.next();
    if (done) return value;
    if (performance.now() - start < SLICE) continue;
    $("progress").hidden = false;
    $("progress").value = value;
    await new Promise((go) => setTimeout(go));
    if (!wanted()) return null;
    start = performance.now();
  }
}

/** Changes what a network is asked. */
function ask(changes) {
  change(changes);
  recompute();
}

/** Makes pixels of the size that the network takes the person's own picture. */
function showOwn(pixels) {
  const shape = view().images.shape.slice(1);
  live.own = Object.assign(pixels, { shape, version: (live.own?.version || 0) + 1 });
  if (!$("images").querySelector('[value="own"]')) addImage("own", "yours").scrollIntoView({ block: "nearest" });
  const canvas = $("images").querySelector('[value="own"]').parentNode.querySelector("canvas");
  canvas.getContext("2d").drawImage(inColor(pixels, shape), 0, 0);
  ask({ image: "own" });
}

async function openPicture(file) {
  if (!view().classes) return notice("There is no network in this page to show a picture to: it was made of attention maps.");
  if (!networks[state.run]) return notice("The network is not part of this page, so it cannot judge a picture of your own.");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return notice(`${file.name || "That"} is no picture that this browser reads.`);
  }
  const canvas = element("canvas", { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, bitmap.width, bitmap.height); // what is transparent is black
  context.drawImage(bitmap, 0, 0);
  stopDrawing();
  showOwn(fitted(context.getImageData(0, 0, bitmap.width, bitmap.height), view().images.shape.slice(1)));
  notice("");
}

/** Tells the person something about their picture. */
function notice(words) {
  $("notice").textContent = words;
}
