"""A person can choose, compare, touch and save everything on the page, by mouse, by touch, and by keyboard alone."""

import collections
import csv
import functools
import html
import http.client
import io
import threading
import time

import browser
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import program
import pytest
from etils import epath

from attn_cnn import load_run, predict, train
from attn_cnn.attention import attention_maps
from attn_cnn.explorer import __main__ as command
from attn_cnn.explorer import network, page, view
from attn_cnn.maps import Maps, write
from attn_cnn.training import augment, data, pictures
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment, random_state
from configs import gated, learned, learned_content, quadratic, resnet18

pytestmark = browser.needed
SHOWN = 4


def untrained(folder, experiment):
    """Makes a run that has done no step."""
    experiment = create_experiment(program.tiny_config(experiment))
    workdir_lib.create(epath.Path(folder), experiment.config, experiment.spec, random_state(experiment))
    return folder


@pytest.fixture(scope="module")
def quadratic_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "quadratic"
    train.train(program.tiny_config(quadratic, epochs=2, **{"checkpoint.every_epochs": 1}), workdir)
    return workdir


@pytest.fixture(scope="module")
def gated_run(tmp_path_factory):
    """A run with the numbers of its heads over three epochs."""
    workdir = untrained(tmp_path_factory.mktemp("runs") / "<b>gated & co", gated)
    centers = np.random.default_rng(0).normal(size=(3, 1, 9, 2)).astype(np.float32)
    precisions = np.broadcast_to(np.eye(2, dtype=np.float32), (3, 1, 9, 2, 2))
    numbers = {"center": centers, "precision": precisions, "gate": np.full((3, 1, 9), 0.5, np.float32)}
    np.savez(workdir / "heads.npz", epoch=np.arange(1, 4), step=14 * np.arange(1, 4), **numbers)
    return workdir


@pytest.fixture(scope="module")
def addresses(tmp_path_factory, quadratic_run, gated_run):
    """The pages of one run and of two."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "one").mkdir(), (folder / "two").mkdir()
    one = page.of_runs([quadratic_run], SHOWN, False, "newest")
    two = page.of_runs([quadratic_run, gated_run], SHOWN, False, "newest")
    return {"one": browser.written(folder / "one", one), "two": browser.written(folder / "two", two)}


@pytest.fixture
def one(chromium, addresses):
    with browser.opened(chromium, addresses["one"]) as opened:
        yield opened


@pytest.fixture
def two(chromium, addresses):
    with browser.opened(chromium, addresses["two"]) as opened:
        yield opened


def settle(opened):
    """Waits until what was done is drawn and computed."""
    opened.wait_for_timeout(120)
    wait(opened, "!waiting && $('progress').hidden")


def tell(opened):
    """Waits until what was done is told to screen readers and the address, too, which is done less often."""
    settle(opened)
    opened.wait_for_timeout(450)


def wait(opened, condition, seconds=20):
    """Waits until a condition holds; Playwright's own way would be a script that the page's policy refuses."""
    end = time.monotonic() + seconds
    while not opened.evaluate(condition):
        assert time.monotonic() < end, condition
        opened.wait_for_timeout(30)


def state(opened):
    return opened.evaluate("state")


def drawn(opened, id):
    return opened.evaluate("id => document.getElementById(id).toDataURL()", id)


def cell(opened, id, row, column, rows=4, columns=4):
    """The middle of a pixel of a canvas, on the screen."""
    opened.locator(f"#{id}").evaluate("element => element.scrollIntoView({ block: 'center' })")
    box = opened.locator(f"#{id}").bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / columns, box["y"] + (row + 0.5) * box["height"] / rows


# The query


def test_hovering_chooses_the_query_and_a_click_pins_it(one):
    before = drawn(one, "maps")
    one.mouse.move(*cell(one, "picture", 0, 3))
    settle(one)
    assert state(one)["query"] == [0, 3] and drawn(one, "maps") != before
    one.mouse.down(), one.mouse.up()
    one.mouse.move(*cell(one, "picture", 3, 0))
    assert state(one)["query"] == [0, 3]
    one.mouse.down(), one.mouse.up(), one.mouse.down(), one.mouse.up()
    one.mouse.move(*cell(one, "picture", 1, 1))
    assert state(one)["query"] == [1, 1]


def test_everything_is_reached_and_used_by_keyboard_alone(one):
    reached = []
    for _ in range(60):
        one.keyboard.press("Tab")
        focused = one.evaluate("document.activeElement.id || document.activeElement.name")
        if not focused or focused in reached[:1]:
            break
        reached.append(focused)
        if focused == "picture":
            one.keyboard.press("ArrowUp"), one.keyboard.press("ArrowLeft")
        if focused == "maps":
            one.keyboard.press("ArrowRight")
        if focused == "large":
            one.keyboard.press("ArrowDown"), one.keyboard.press("Shift+ArrowRight")
            read = one.inner_text("#pointer")
        if focused in ("values", "image"):
            one.keyboard.press("ArrowRight")
        if focused in ("epoch", "sharpness"):
            one.keyboard.press("ArrowLeft" if focused == "epoch" else "ArrowRight")
        if focused in ("outlines", "on"):
            one.keyboard.press("Space")
    settle(one)
    wanted = "picture image draw pick values outlines maps play epoch layer head large on sharpness"
    assert {*wanted.split(), "save-png", "save-svg", "save-csv", "copy"} <= set(reached)
    now = state(one)
    assert read.startswith("1 down: score ")
    assert now["query"] == [1, 1] and now["head"] == 1 and now["values"] == "scores" and now["image"] == 1
    assert now["epoch"] == 0 and now["sharpness"] == 0.25 and not now["outlines"] and now["off"] == ["0:1"]


def test_a_touch_chooses_on_a_phone_where_nothing_is_wider_than_the_screen(chromium, addresses):
    with browser.opened(chromium, addresses["two"], browser.PHONE, has_touch=True, is_mobile=True) as opened:
        opened.touchscreen.tap(*cell(opened, "picture", 3, 0))
        settle(opened)
        assert state(opened)["query"] == [3, 0]
        opened.touchscreen.tap(*cell(opened, "large", 3, 1))
        settle(opened)
        assert opened.inner_text("#pointer").startswith("1 right: probability ")
        opened.click("#table-title")
        assert opened.evaluate("document.documentElement.scrollWidth") <= browser.PHONE["width"]


# What is read


def test_the_numbers_under_the_pointer_are_the_models(one, quadratic_run):
    run = load_run(quadratic_run)
    maps = attention_maps(run.model, run.params, jnp.zeros((1, 8, 8, 1)))
    one.mouse.move(*cell(one, "picture", 1, 1))
    one.mouse.down(), one.mouse.up()
    one.mouse.move(*cell(one, "large", 2, 3))
    settle(one)
    text = one.inner_text("#pointer")
    assert text.startswith("2 right, 1 down: probability ")
    assert float(text.split()[-1]) == pytest.approx(float(maps[0][0, 0, 1, 1, 2, 3]), rel=1e-2)
    x, y, *_ = one.evaluate("$('maps').tiles.at(0, 2)")
    box = one.locator("#maps").bounding_box()
    one.mouse.move(box["x"] + x + 4, box["y"] + y + 4)
    assert one.inner_text("#pointer").startswith("Layer 0, head 2: 1 left, 1 up: probability ")


def test_a_screen_reader_hears_a_sentence_and_finds_a_table(one):
    one.focus("#maps")
    one.keyboard.press("ArrowRight")
    tell(one)
    sentence = one.text_content("#sentence")
    assert sentence.startswith("Layer 0, head 1: center ") and sentence.endswith("% within 3x3.")
    assert one.get_attribute("#sentence", "aria-live") == "polite"
    assert one.locator("#table tbody tr").count() == 9


@pytest.mark.parametrize("viewport", [browser.DESKTOP, browser.PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(chromium, addresses, theme, viewport):
    from axe_playwright_python.sync_playwright import Axe

    # axe is put into the page as a script, which the page's own policy refuses.
    with browser.opened(chromium, f"{addresses['two']}#other=1", viewport, theme, bypass_csp=True) as opened:
        opened.click("summary")
        found = Axe().run(opened)
        assert found.violations_count == 0, found.generate_report()


def test_names_are_shown_as_they_are(two):
    two.select_option("#run", "1")
    settle(two)
    assert two.locator("b").count() == 0
    assert two.locator("#run option").all_inner_texts() == ["quadratic", "<b>gated & co"]
    assert "<b>gated & co" in two.title()


# What is chosen


def test_each_choice_changes_the_view(two):
    two.select_option("#run", "1")
    settle(two)
    seen = {drawn(two, "maps")}
    steps = [
        "[name=values][value=scores]",
        "[name=part][value=position]",
        "[name=part][value=content]",
        "#outlines",
        "[name=image][value='2']",
        "[name=image][value=average]",
    ]
    for step in steps:
        two.locator(step).click()
        settle(two)
        seen.add(drawn(two, "maps"))
    assert len(seen) == len(steps) + 1


def test_position_alone_of_a_gated_head_is_the_softmax_of_its_gaussian(two, gated_run):
    run = load_run(gated_run)
    two.select_option("#run", "1")
    two.locator("[name=part][value=position]").click()
    settle(two)
    position = run.params["layer_0"]["attention"]
    d = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1) - [2, 2]
    scores = -0.5 * (position["spreads"][0] * np.linalg.norm(d - position["centers"][0], axis=-1)) ** 2
    np.testing.assert_allclose(two.evaluate("Array.from($('large').map.P)"), jax.nn.softmax(scores.ravel()), atol=1e-5)


def test_two_runs_stand_side_by_side_or_as_a_difference(two):
    assert not two.is_visible("#other-maps")
    two.select_option("#other", "1")
    settle(two)
    assert two.is_visible("#other-maps") and drawn(two, "maps") != drawn(two, "other-maps")
    two.locator("[name=sides][value=difference]").click()
    settle(two)
    assert not two.is_visible("#other-maps")
    assert two.inner_text("#maps-caption").startswith("quadratic minus <b>gated & co")
    values = two.evaluate("Array.from($('maps').maps[0][0].values)")
    assert sum(values) == pytest.approx(0, abs=1e-5) and min(values) < 0


def test_the_address_holds_the_view(chromium, addresses, two):
    two.select_option("#run", "1")
    two.locator("[name=values][value=scores]").click()
    two.locator("[name=image][value='3']").click()
    two.mouse.move(*cell(two, "picture", 0, 1))
    two.uncheck("#on")
    tell(two)
    address, before = two.url, state(two)
    with browser.opened(chromium, address) as opened:
        settle(opened)
        assert state(opened) == before
        assert drawn(opened, "maps") == drawn(two, "maps")


@pytest.mark.parametrize(
    "text",
    [
        "centers={%220:0.5%22:[1,1],%2200:0%22:[1,1],%220:1%22:[],%220:2%22:[1,2,3],%220:3%22:{}}&constructor=1",
        "off=[%220:0%22,%220:0%22,%2200:0%22,%220:0.5%22,%22:%22]&epoch=1e9&sharpness=-1",
        "query=[99,-1]&layer=7&head=-3&run=5",
        "query=7&off=[%2299:1%22,3]&centers=7&image=%22own%22",
        "nonsense&a=b&part={}",
    ],
)
def test_an_address_of_another_page_is_understood_as_far_as_it_goes(chromium, addresses, text):
    with browser.opened(chromium, f"{addresses['one']}#{text}") as opened:
        settle(opened)
        assert len(opened.inner_text("#facts")) > 20
        assert state(opened)["centers"] == {} and len(state(opened)["off"]) <= 1


def test_centers_in_an_address_are_of_heads_that_have_some(chromium, tmp_path):
    workdir = untrained(tmp_path / "learned", learned)
    address = browser.written(tmp_path, page.of_runs([workdir], SHOWN, False, "newest"))
    with browser.opened(chromium, f"{address}#centers={{%220:0%22:[1,1]}}") as opened:
        assert state(opened)["centers"] == {}


# Training and the theorem


def test_heads_travel_through_training(one):
    last = drawn(one, "maps")
    one.locator("#epoch").fill("0")
    settle(one)
    assert drawn(one, "maps") != last
    one.click("#play")
    wait(one, "state.epoch === -1 && $('play').textContent === 'Play'")
    settle(one)
    assert drawn(one, "maps") == last


def test_the_history_replays_the_numbers_of_every_head(two, gated_run):
    numbers = np.load(gated_run / "heads.npz")
    two.select_option("#run", "1")
    two.locator("#epoch").fill("1")
    settle(two)
    assert two.inner_text("#epoch-output") == "Epoch 2 of 3"
    d = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1) - [2, 2] - numbers["center"][1, 0, 5]
    expected = jax.nn.softmax(-0.5 * (d**2).sum(-1).ravel())
    np.testing.assert_allclose(two.evaluate("Array.from($('maps').maps[0][5].P)"), expected, atol=1e-5)


def test_a_checkpoint_that_ends_no_epoch_has_a_place_of_its_own(chromium, tmp_path, quadratic_run):
    text = page.of_runs([quadratic_run], SHOWN, False, 14)  # after the first of two epochs
    with browser.opened(chromium, browser.written(tmp_path, text)) as opened:
        said = []
        for place in ("0", "1", "2"):
            opened.locator("#epoch").fill(place)
            settle(opened)
            said.append(opened.inner_text("#epoch-output"))
        assert said == ["Epoch 1 of 2", "Epoch 2 of 2", "Checkpoint, step 14"]


def test_playing_stops_when_another_run_is_chosen(two):
    two.click("#play")
    two.select_option("#run", "1")
    settle(two)
    assert two.inner_text("#play") == "Play" and state(two)["epoch"] == -1


@pytest.fixture(scope="module")
def content_page(tmp_path_factory):
    """The page of a run whose heads look where the image says, with the numbers of its heads over two epochs."""
    workdir = untrained(tmp_path_factory.mktemp("runs") / "content", learned_content)
    shift, covariance = (
        np.full((2, 1, 9, 2), 1.5, np.float32),
        np.broadcast_to(np.eye(2, dtype=np.float32), (2, 1, 9, 2, 2)),
    )
    np.savez(workdir / "heads.npz", epoch=[1, 2], step=[14, 28], mean_shift=shift, covariance=covariance)
    return browser.written(workdir, page.of_runs([workdir], SHOWN, False, "newest"))


def test_of_heads_whose_past_maps_were_not_kept_the_past_shows_no_maps_but_the_mean_shift(chromium, content_page):
    with browser.opened(chromium, content_page) as opened:
        opened.locator("#epoch").fill("0")
        settle(opened)
        assert opened.inner_text("#maps-caption").endswith("its maps at this epoch were not kept")
        assert opened.evaluate("$('large').map.values === null && $('large').map.outline.center[0] === 1.5")
        assert opened.inner_text("#facts").split("\n") == ["Mean shift, all queries", "1.5 right, 1.5 down"]
        assert "Solid line" not in opened.inner_text("#legend") and "ellipse" in opened.inner_text("#legend")
        assert opened.is_disabled("#values input >> nth=1") and opened.is_disabled("#save-csv")
        svg = save(opened, "save-svg").decode()
        assert "mean and spread of each head's shift over images and all queries; Epoch 1 of 2" in svg


def test_their_last_epoch_and_their_maps_now_are_two_places(chromium, content_page):
    with browser.opened(chromium, content_page) as opened:
        assert opened.inner_text("#epoch-output").startswith("Checkpoint")
        opened.locator("#epoch").fill("1")
        settle(opened)
        assert opened.inner_text("#epoch-output") == "Epoch 2 of 2"
        assert opened.inner_text("#facts").startswith("Mean shift, all queries")
        opened.locator("#epoch").fill("2")
        settle(opened)
        assert opened.inner_text("#facts").startswith("Mean shift\n") and opened.is_enabled("#save-csv")


def test_heads_that_see_the_image_are_called_no_convolution(chromium, content_page):
    with browser.opened(chromium, content_page) as opened:
        assert opened.inner_text("#theorem-text").endswith("and the layer is no convolution.")
        assert opened.inner_text("#theorem-title") == "The kernel at this query"
        opened.evaluate("change({ image: 'average', off: ['0:1'] })")
        settle(opened)
        assert opened.inner_text("#prediction-note").endswith("Layers see here what they saw before you changed heads.")


def test_the_mean_over_images_is_not_measured_against_single_taps(chromium, content_page):
    with browser.opened(chromium, content_page) as opened:
        assert opened.is_visible("#distance-line") and "Solid line" in opened.inner_text("#legend")
        opened.evaluate("change({ image: 'average' })")
        settle(opened)
        assert opened.is_hidden("#distance-line")
        assert opened.inner_text("#theorem-text").startswith(
            "Over the images, the layer weighs pixels at this query by"
        )


def test_a_center_is_dragged_no_further_than_the_grid(one):
    one.evaluate("change({ query: [1, 1] })")
    settle(one)
    one.focus("#large")
    for _ in range(30):
        one.keyboard.press("Shift+ArrowRight")
    settle(one)
    assert state(one)["centers"]["0:0"][1] == 2.5  # the right border, seen from the query in column 1 of 4


def test_what_was_read_under_the_pointer_goes_where_the_view_changes(one):
    one.mouse.move(*cell(one, "large", 2, 3))
    settle(one)
    assert "probability" in one.inner_text("#pointer")
    one.select_option("#head", "3")
    settle(one)
    assert one.inner_text("#pointer") == ""


def test_the_gate_travels_through_training(two):
    two.select_option("#run", "1")
    two.locator("#epoch").fill("0")
    settle(two)
    assert two.inner_text("#facts").split()[-1] == "50%"


def test_the_last_epoch_of_the_history_is_the_checkpoint(one):
    ours, theirs = one.evaluate(
        """() => [null, 1].map(epoch => { state.epoch = epoch === null ? -1 : epoch;
             const maps = allMaps(0)[0].map(({P}) => Array.from(P)); state.epoch = -1; return maps; })"""
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_sharper_heads_become_the_taps_of_a_convolution(one):
    distances = []
    for sharpness in ("0", "6", "12"):
        one.locator("#sharpness").fill(sharpness)
        settle(one)
        distances.append(float(one.inner_text("#distance")))
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.1 * distances[0]
    assert one.inner_text("#shares tbody").count("%") == 2 * 4


def test_the_convolution_is_the_checkpoints_in_all_parts_without_heads_that_are_off(two):
    two.select_option("#run", "1")
    settle(two)
    before = two.inner_text("#distance")
    two.locator("[name=part][value=position]").click()
    two.locator("#epoch").fill("0")
    settle(two)
    assert two.inner_text("#distance") == before and "the trained network's" in two.inner_text("#theorem-text")
    assert "the trained network's" in two.inner_text("#prediction-note")
    two.locator("#epoch").fill("3")
    two.uncheck("#on")
    settle(two)
    assert two.inner_text("#distance") != before and "8 heads that are on" in two.inner_text("#theorem-text")


# The network


def test_predictions_are_those_of_mode_predict(one, quadratic_run):
    images = data.load("digits").test_images[:200]
    expected = predict.predict(load_run(quadratic_run), images).argmax(-1)
    ours = one.evaluate(PREDICT, [images.reshape(200, -1).tolist()])
    assert ours == expected.tolist()


def test_a_large_network_is_left_out_with_a_word_or_goes_in_in_half_precision(quadratic_run, monkeypatch, caplog):
    caplog.set_level("INFO", "attn_cnn")
    monkeypatch.setattr(page, "INLINED_BYTES", 4 * network.size(network.steps(load_run(quadratic_run))) - 1)
    built = []
    monkeypatch.setattr(page, "build", lambda _, networks: built.append(networks) or "")
    page.of_runs([quadratic_run], 1, False, "newest")
    assert "leaves the network out, which is large; --weights puts it in" in caplog.text
    page.of_runs([quadratic_run], 1, True, "newest")
    assert built[0] == [None]
    sizes = collections.Counter()
    for leaf in jax.tree.leaves(built[1]):
        if hasattr(leaf, "dtype"):
            sizes[leaf.dtype.name] += leaf.size
    assert sizes["float16"] > 0.9 * sizes.total()


def test_predictions_hold_in_half_precision(chromium, tmp_path, quadratic_run):
    run, images = load_run(quadratic_run), data.load("digits").test_images[:200]
    steps = network.steps(run)
    shown = view.of_run(run, "half", SHOWN, steps, half=True)
    text = page.build([shown], [[page.in_half_precision(step) for step in steps]])
    expected = predict.predict(run, images).argmax(-1)
    with browser.opened(chromium, browser.written(tmp_path, text)) as opened:
        ours = opened.evaluate(PREDICT, [images.reshape(200, -1).tolist()])
    assert (np.array(ours) == expected).sum() >= 198


PREDICT = """([pictures]) => pictures.map(pixels => {
  const {logits} = finish(predictor(pixels));
  return logits.indexOf(Math.max(...logits));
})"""


def test_an_answer_is_shown_for_what_was_asked_alone(one):
    one.uncheck("#on")
    settle(one)
    one.evaluate("() => { recompute = () => {}; change({ image: 1 }); }")
    one.wait_for_timeout(100)
    shipped = one.evaluate("Array.from(view().probabilities.subarray(10, 20))")
    assert one.evaluate("Array.from(prediction())") == shipped


def test_a_head_that_is_off_adds_nothing(one, quadratic_run):
    run = load_run(quadratic_run)
    one.select_option("#head", "4")
    one.uncheck("#on")
    settle(one)
    params = jax.tree.map(np.array, run.params)
    params["layer_0"]["attention"]["value"]["kernel"][4] = 0
    images = data.load("digits").test_images[:1]
    expected = predict.predict(run._replace(params=params), images)[0]
    np.testing.assert_allclose(one.evaluate("Array.from(prediction())"), expected, atol=1e-4)
    assert "1 head off" in one.inner_text("#prediction-note")
    one.click("#restore")
    settle(one)
    assert one.is_checked("#on") and one.is_disabled("#restore")


def test_a_center_that_is_dragged_moves_and_the_network_answers(one, quadratic_run):
    run = load_run(quadratic_run)
    one.locator("#large").scroll_into_view_if_needed()
    box, center = one.locator("#large").bounding_box(), np.array(run.params["layer_0"]["attention"]["centers"])[0]
    at = [
        box[axis] + (2.5 + c) * box[size] / 4
        for axis, size, c in (("x", "width", center[1]), ("y", "height", center[0]))
    ]
    one.mouse.move(*map(float, at))
    one.mouse.down()
    one.mouse.move(*cell(one, "large", 0, 3), steps=4)
    one.mouse.up()
    settle(one)
    assert state(one)["centers"] == {"0:0": pytest.approx([-2, 1], abs=0.05)}
    params = jax.tree.map(np.array, run.params)
    params["layer_0"]["attention"]["centers"][0] = state(one)["centers"]["0:0"]
    expected = predict.predict(run._replace(params=params), data.load("digits").test_images[:1])[0]
    np.testing.assert_allclose(one.evaluate("Array.from(prediction())"), expected, atol=1e-4)


def test_a_center_moves_by_keyboard(one):
    before = one.evaluate("Array.from(views[0].layers[0].parameters.centers.slice(0, 2))")
    one.focus("#large")
    one.keyboard.press("Shift+ArrowRight")
    settle(one)
    assert state(one)["centers"] == {"0:0": pytest.approx([before[0], before[1] + 0.25], abs=1e-3)}


def test_a_picture_of_ones_own_is_predicted_as_mode_predict_does(one, tmp_path, quadratic_run):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "mine.png")
    one.set_input_files("#file", tmp_path / "mine.png")
    settle(one)
    run = load_run(quadratic_run)
    image = pictures.read(epath.Path(tmp_path / "mine.png"), (8, 8, 1))
    shown = np.array(one.evaluate("Array.from(live.own)"), np.uint8).reshape(8, 8, 1)
    assert np.abs(shown.astype(int) - image).max() <= 1  # the browser rounds once more
    expected = predict.predict(run, shown[None])[0]
    np.testing.assert_allclose(one.evaluate("Array.from(prediction())"), expected, atol=1e-4)
    assert state(one)["image"] == "own"
    (tmp_path / "text.png").write_text("hello")
    one.set_input_files("#file", tmp_path / "text.png")
    settle(one)
    assert "no picture" in one.inner_text("#notice")


def test_a_picture_of_ones_own_goes_to_both_runs(two, tmp_path, gated_run):
    PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "mine.png")
    two.select_option("#other", "1")
    two.set_input_files("#file", tmp_path / "mine.png")
    settle(two)
    run, image = load_run(gated_run), pictures.read(epath.Path(tmp_path / "mine.png"), (8, 8, 1))
    maps = attention_maps(run.model, run.params, augment.normalize(jnp.asarray(image[None]), run.mean, run.std))
    ours = two.evaluate("Array.from($('other-maps').maps[0][3].P)")
    np.testing.assert_allclose(ours, maps[0][0, 3, 2, 2].ravel(), atol=1e-4)


def test_a_picture_is_dropped_or_pasted(one):
    send = """kind => new Promise(done => {
      const canvas = Object.assign(document.createElement("canvas"), {width: 20, height: 20});
      canvas.toBlob(blob => {
        const files = new DataTransfer();
        files.items.add(new File([blob], "mine.png", {type: "image/png"}));
        document.dispatchEvent(kind === "drop" ? new DragEvent("drop", {dataTransfer: files})
          : new ClipboardEvent("paste", {clipboardData: files}));
        done();
      });
    })"""
    for kind in ("drop", "paste"):
        one.locator("[name=image][value='0']").click()
        one.evaluate(send, kind)
        settle(one)
        assert state(one)["image"] == "own" and one.locator("#prediction li").count() == 4


def test_a_drawing_is_predicted_while_it_is_drawn(one):
    one.click("#draw")
    one.mouse.move(*cell(one, "picture", 0, 1))
    one.mouse.down()
    one.mouse.move(*cell(one, "picture", 3, 1))  # in one stroke, as a quick hand does
    settle(one)
    before = one.evaluate("Array.from(prediction())")
    ink = np.array(one.evaluate("Array.from(live.own)")).reshape(8, 8)
    assert state(one)["image"] == "own" and (ink[1:7, 2:4].max(1) == 255).all() and (ink > 100).sum() < 40
    one.mouse.move(*cell(one, "picture", 3, 3))
    settle(one)
    assert one.evaluate("Array.from(prediction())") != before
    one.mouse.up()
    one.locator("[name=image][value='0']").click()
    one.mouse.click(*cell(one, "picture", 3, 3))
    settle(one)
    assert state(one)["image"] == 0 and one.get_attribute("#draw", "aria-pressed") == "false"


def test_a_query_in_the_address_stays_where_it_is_when_the_pointer_comes(chromium, addresses):
    with browser.opened(chromium, f"{addresses['one']}#query=[3,0]") as opened:
        opened.mouse.move(*cell(opened, "picture", 1, 2))
        settle(opened)
        assert state(opened)["query"] == [3, 0] and opened.inner_text("#picture-help").startswith("Pinned")


# Saving


def save(opened, id):
    with opened.expect_download() as download:
        opened.click(f"#{id}")
    return open(download.value.path(), "rb").read()


def test_the_view_is_saved_as_pictures_and_its_numbers_as_csv(two):
    two.select_option("#other", "1")
    settle(two)
    picture = PIL.Image.open(io.BytesIO(save(two, "save-png")))
    assert picture.size[0] == 2 * 960 and len(set(picture.convert("RGB").tobytes())) > 50
    svg = save(two, "save-svg").decode()
    assert svg.startswith("<svg") and svg.count("<clipPath") == 18 and "&#60;b&#62;gated &#38; co" in svg
    assert (
        "image 0; query at row 2, column 2, counted from 0; probabilities, each head on its own scale; Epoch 2 of 2"
        in svg
    )
    rows = list(csv.DictReader(io.StringIO(save(two, "save-csv").decode())))
    assert len(rows) == 2 * 9 * 16 and {row["run"] for row in rows} == {"quadratic", "<b>gated & co"}
    assert [rows[0][name] for name in ("image", "layer", "head")] == ["0", "Layer 0", "0"]
    first = [float(row["probability"]) for row in rows[:16]]
    assert sum(first) == pytest.approx(1, abs=1e-5)
    scores = np.array([float(row["score"]) for row in rows[:16]])
    np.testing.assert_allclose(jax.nn.softmax(scores), first, atol=1e-5)


def test_the_link_to_the_view_is_copied(chromium, addresses):
    with browser.opened(chromium, addresses["one"], permissions=["clipboard-read", "clipboard-write"]) as opened:
        opened.locator("[name=values][value=scores]").click()
        opened.click("#copy")
        settle(opened)
        assert "values=%22scores%22" in opened.evaluate("navigator.clipboard.readText()")


def test_the_page_works_inside_a_notebook(chromium, addresses, tmp_path):
    page = html.escape(epath.Path(addresses["one"].removeprefix("file://")).read_text())
    address = browser.written(tmp_path, f'<!doctype html><body data-ready><iframe srcdoc="{page}"></iframe>')
    with browser.opened(chromium, address) as outer:
        inner = outer.frames[1]
        inner.wait_for_selector("body[data-ready]")
        inner.select_option("#head", "1")
        tell(inner)
        assert inner.text_content("#sentence").startswith("Layer 0, head 1: ")
        assert not inner.is_visible("#copy")  # there is no address to link to


# What the page allows


def test_the_policy_allows_no_script_but_the_pages_own(chromium, addresses):
    context = chromium.new_context()
    opened = context.new_page()
    opened.goto(addresses["one"])
    opened.wait_for_selector("body[data-ready]")
    with pytest.raises(Exception, match="Content Security Policy"):
        opened.add_script_tag(content="document.body.dataset.broken = 1")
    assert not opened.evaluate("'broken' in document.body.dataset")
    assert opened.evaluate(REFUSED) == "connect-src"
    context.close()


REFUSED = """new Promise((told) => {
  addEventListener("securitypolicyviolation", (event) => told(event.effectiveDirective));
  fetch("https://example.org").then(() => told("nothing"), () => setTimeout(told, 1000, "nothing"));
})"""


def test_a_name_that_ends_a_script_is_a_name(chromium, tmp_path, quadratic_run):
    run = load_run(quadratic_run)
    steps = network.steps(run)
    shown = view.of_run(run, "</script><b>x", SHOWN, steps, half=False)
    shown["classes"][0] = "</script><script>document.body.remove()</script>"
    with browser.opened(chromium, browser.written(tmp_path, page.build([shown], [steps]))) as opened:
        assert opened.evaluate("view().classes[0]") == shown["classes"][0] and opened.locator("b").count() == 0


# Pages of other things


def test_a_resnets_page_predicts(chromium, tmp_path):
    workdir = untrained(tmp_path / "resnet", resnet18)
    address = browser.written(tmp_path, page.of_runs([workdir], SHOWN, False, "newest"))
    images = data.load("digits").test_images[:50]
    expected = predict.predict(load_run(workdir), images).argmax(-1)
    with browser.opened(chromium, address) as opened:
        assert not opened.is_visible("#maps") and opened.locator("#prediction li").count() == 4
        assert opened.evaluate(PREDICT, [images.reshape(50, -1).tolist()]) == expected.tolist()


@pytest.mark.parametrize("images", [None, np.full((2, 40, 40, 3), 90, np.uint8)], ids=["alone", "with images"])
def test_maps_of_any_transformer_make_a_page(chromium, tmp_path, images):
    maps = [np.asarray(jax.nn.softmax(np.random.default_rng(n).normal(size=(2, 3, 25)), -1)) for n in range(2)]
    maps = [np.broadcast_to(of.reshape(2, 3, 1, 1, 5, 5), (2, 3, 5, 5, 5, 5)) for of in maps]
    write(epath.Path(tmp_path / "maps.npz"), Maps(maps, images))
    address = browser.written(tmp_path, page.of_maps(tmp_path / "maps.npz", 20))
    with browser.opened(chromium, address) as opened:
        opened.locator("[name=image][value='1']").click()
        assert opened.locator("#images canvas").count() == (0 if images is None else 3)
        opened.select_option("#layer", "1")
        settle(opened)
        ours = opened.evaluate("Array.from($('large').map.P)")
        np.testing.assert_allclose(ours, maps[1][1, 0, 0, 0].ravel(), atol=1 / 255)
        assert not opened.is_visible("#prediction") and not opened.is_visible("#theorem-section")
        opened.evaluate("openPicture(new Blob())")
        assert "made of attention maps" in opened.inner_text("#notice")


def test_an_expressed_layer_is_its_convolution_at_the_border_too(chromium, tmp_path):
    workdir = tmp_path / "resnet"
    experiment = create_experiment(program.tiny_config(resnet18, **{"model.layer": "attention"}))
    start = random_state(experiment)
    exact = jax.tree_util.tree_map_with_path(
        lambda path, a: jnp.full_like(a, 16.0) if path[-1].key == "spreads" else a, start.params
    )
    workdir_lib.create(epath.Path(workdir), experiment.config, experiment.spec, start.replace(params=exact))
    address = browser.written(tmp_path, page.of_runs([workdir], SHOWN, False, "newest"))
    with browser.opened(chromium, address) as opened:
        for query in ([0, 0], [3, 4]):
            opened.evaluate("query => change({ query })", query)
            settle(opened)
            assert opened.inner_text("#distance") in ("0.00", "below 1e-6")
            assert opened.inner_text("#facts").count("100%") == 2  # within 3x3 and 5x5


def test_the_page_is_served_on_this_machine(chromium, quadratic_run):
    with command.server(page.of_runs([quadratic_run], SHOWN, False, "newest")) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        with browser.opened(chromium, f"http://127.0.0.1:{serving.server_port}/") as opened:
            assert opened.locator("#prediction li").count() == 4
        asking = http.client.HTTPConnection("127.0.0.1", serving.server_port)
        asking.request("GET", "/etc/passwd")
        assert asking.getresponse().status == 404
        serving.shutdown()
    assert serving.server_address[0] == "127.0.0.1"


# The command


run_command = functools.partial(program.run_module, "attn_cnn.explorer")


def test_the_command_writes_a_page_and_says_how_large_it_is(quadratic_run, tmp_path):
    done = run_command(f"--workdir={quadratic_run}", f"--out={tmp_path}/new/page.html", "--images=3")
    assert done.returncode == 0, done.stderr
    assert "page.html: 0." in done.stdout and (tmp_path / "new" / "page.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the page needs --workdir=RUN, or --maps=FILE in its place"),
        (["--workdir=run", "--maps=maps.npz"], "both are given; leave one of them out"),
        (["--maps=nothing.npz"], "nothing.npz does not exist"),
        (["--maps=nothing.npz", "--weights"], "--weights goes with --workdir"),
        (["--workdir=nowhere"], "holds no run"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(arguments, message):
    done = run_command(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
