"use strict";
/** The network at work: predictions of the current picture, which may be the person's own, with the heads as they are now. */

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
