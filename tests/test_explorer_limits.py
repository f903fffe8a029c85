"""The page is as small and as quick as it promises: sizes exactly, times within three of them on a busy machine."""

import statistics

import browser
import jax
import numpy as np
import pytest

from attn_cnn.explorer import network, page, view
from attn_cnn.model import create_model
from attn_cnn.training.dataset import Spec
from attn_cnn.training.runs import Run
from configs import learned_content, quadratic

pytestmark = browser.needed
BUSY = 3  # times as long as on a machine with nothing else to do
MEGABYTE = 1e6
draw = np.random.default_rng(0)


def numbers(*shape, dtype=np.float32):
    return draw.normal(size=shape).astype(dtype)


def with_images(layers, images, history=None, shape=(32, 32, 3)):
    return {
        "name": "run",
        "about": "",
        "step": 99,
        "classes": [str(n) for n in range(10)],
        "mean": [0.5] * shape[-1],
        "std": [0.25] * shape[-1],
        "images": draw.integers(0, 256, (images, *shape), np.uint8),
        "labels": [0] * images,
        "probabilities": np.full((images, 10), 0.1, np.float32),
        "layers": layers,
        "history": history,
    }


def layer(number, parameters, **more):
    fixed = {"name": f"Layer {number + 1}", "number": number, "grid": [16, 16], "padding": 0}
    return fixed | {"parameters": parameters, "gram": numbers(9, 9)} | more


def paper_position_only():
    history = {
        "epoch": np.arange(100),
        "step": np.arange(100),
        "center": numbers(100, 6, 9, 2),
        "precision": numbers(100, 6, 9, 2, 2),
    }
    heads = {"encoding": "quadratic", "centers": 2 * numbers(9, 2), "spreads": 1 + 0.1 * numbers(9)}
    return page.build([with_images([layer(n, heads) for n in range(6)], 20, history)], [None])


def paper_content():
    """The largest: learned with content, without weights, half precision."""

    def heads():
        row, column = (
            {f"{axis}_keys": numbers(9, 31, 400), f"{axis}_biases": numbers(9, 31)} for axis in ("row", "column")
        )
        content = {"query": numbers(9, 400, 400, dtype=np.float16), "bias": numbers(9, 400)}
        return {"encoding": "learned_content", "position": row | column, "content": content}

    layers = [layer(n, heads(), features=numbers(10, 16, 16, 400, dtype=np.float16)) for n in range(6)]
    return page.build([with_images(layers, 10)], [None])


def digits(experiment):
    """The page of random weights at the scale of the digits, all in."""
    return of_config(experiment.get_config("digits"))


def of_config(config):
    model, shape = create_model(config.model), tuple(config.model.image_shape)
    images = numbers(20, *shape)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    mean, std = (0.5,) * shape[-1], (0.25,) * shape[-1]
    run = Run(model, params, {}, config, mean, std, 0, Spec(shape, mean, std, 1, tuple("0123456789")))
    steps = network.steps(run)
    layers = view.layers(run, jax.numpy.asarray(images), steps, half=False)
    history = {
        "epoch": np.arange(60),
        "step": np.arange(60),
        "center": numbers(60, 3, 9, 2),
        "precision": numbers(60, 3, 9, 2, 2),
    }
    return page.build([with_images(layers, 20, history, shape)], [steps])


@pytest.mark.parametrize(
    "make, megabytes",
    [
        (paper_position_only, 5),
        (paper_content, 60),
        (lambda: digits(quadratic), 2),
        (lambda: digits(learned_content), 3),
        (lambda: of_config(quadratic.get_config("small")), 3),
    ],
    ids=["position only at the paper's scale", "content at the paper's scale", "digits", "digits with content", "demo"],
)
def test_pages_are_small(make, megabytes):
    assert len(make()) <= megabytes * MEGABYTE


def median_of_50(opened, call):
    """The median of the durations that the browser's performance timeline measured, in milliseconds."""
    durations = opened.evaluate(
        """() => {
          for (let n = 0; n < 50; n++) { performance.mark("start"); CALL; performance.measure("call", "start"); }
          return performance.getEntriesByName("call").map(({duration}) => duration);
        }""".replace("CALL", call)
    )
    assert len(durations) == 50
    return statistics.median(durations)


def test_the_first_view_comes_within_a_second_and_hovering_redraws_within_a_frame(chromium, tmp_path):
    with browser.opened(chromium, browser.written(tmp_path, paper_position_only())) as opened:
        first = opened.evaluate("performance.getEntriesByName('first view')[0].startTime")
        redraw = median_of_50(opened, "state.query = [n % 16, 8]; show()")
    print(f"first view {first:.0f} ms, redraw {redraw:.1f} ms")
    assert first <= BUSY * 1000 and redraw <= BUSY * 16


@pytest.mark.parametrize("scale, milliseconds", [("digits", 50), ("small", 200)])
def test_the_network_answers_while_one_watches(chromium, tmp_path, scale, milliseconds):
    text = of_config(quadratic.get_config(scale))
    with browser.opened(chromium, browser.written(tmp_path, text)) as opened:
        answer = median_of_50(opened, "finish(predictor(picture()))")
    print(f"{scale}: {answer:.1f} ms")
    assert answer <= BUSY * milliseconds
