"""How much of a convolution a run's attention is: nothing but one where it is one, and told apart where it is not."""

import functools
import json
import shutil

import jax
import numpy as np
import program
import pytest
from etils import epath

from attn_cnn.convolution import recover as recover_lib
from attn_cnn.convolution import report as report_lib
from attn_cnn.convolution.kernels import Window
from attn_cnn.convolution.recover import recover, recover_maps
from attn_cnn.convolution.replace import (
    AROUND_QUERY,
    Cut,
    replaced_config,
    replaced_params,
    replacing,
    sees_all,
    tuned_run,
)
from attn_cnn.convolution.theorem import EXACT_SPREAD
from attn_cnn.errors import UserError
from attn_cnn.maps import Maps, write
from attn_cnn.model import create_model, has_heads
from attn_cnn.predict import logits
from attn_cnn.training.data import SPECS, load_with_test_set
from attn_cnn.training.experiment import create_experiment, random_state
from attn_cnn.training.runs import Run, load_run
from configs import gated, learned, learned_content, quadratic, quadratic_generalized


def untrained(experiment=quadratic, **changes):
    """A run of two layers before its first step."""
    config = program.tiny_config(experiment, **{"model.layers": 2} | changes)
    spec = SPECS["digits"]
    state = random_state(create_experiment(config, spec))
    model = create_model(config.model)
    return Run(model, state.params, {}, create_experiment(config, spec).config, spec.mean, spec.std, 0, spec)


@pytest.fixture(scope="module")
def convolutional():
    """A run whose attention layers are 3x3 convolutions, and its report."""
    run = untrained(**{"model.init": "grid", "model.init_spread": EXACT_SPREAD})
    return run, recover(run, 50)


@pytest.mark.slow
def test_attention_that_is_a_convolution_is_found_to_be_one(convolutional):
    _, found = convolutional
    assert len(found["layers"]) == 2
    for layer in found["layers"]:
        assert [head["target"] for head in layer["heads"]] == [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        assert all(head["peak"] == 1.0 for head in layer["heads"])
        assert [head["spread"] for head in layer["heads"]] == pytest.approx([EXACT_SPREAD] * 9)
        seen = [(4 - abs(i)) * (4 - abs(j)) for i in (-1, 0, 1) for j in (-1, 0, 1)]  # of 16 queries
        assert [head["outside"] for head in layer["heads"]] == pytest.approx([1 - number / 16 for number in seen])
        assert layer["mirrored"] == [(0, 8), (1, 7), (2, 6), (3, 5)] and layer["sharing"] == []
        assert [window["side"] for window in layer["windows"]] == [1, 3, 5, 7]


@pytest.mark.slow
def test_its_3x3_window_explains_it_where_all_is_inside(convolutional):
    run, _ = convolutional
    ideal = np.zeros((9, 7, 7), np.float32)
    ideal[np.arange(9), np.repeat([2, 3, 4], 3), np.tile([2, 3, 4], 3)] = 1
    params = jax.tree.map(np.asarray, run.params)
    layer = recover_lib.Layer(ideal, params["layer_0"]["attention"]["value"]["kernel"])
    cuts, shares = recover_lib.windows_of(layer)
    assert shares == pytest.approx([1 / 9, 1, 1, 1], abs=0.03)
    images = load_with_test_set(run.config.data).test_images[:50]
    errors = recover_lib.replace.layer_errors(run, {0: cuts}, images)[0]
    assert [e.queries for e in errors[1:]] == [4, 0, 0]
    assert errors[1].inside < 1e-5 and errors[2].inside is None
    assert errors[1].everywhere > 0.1  # the border, where attention renormalises
    scaled = [cuts[1]._replace(kernel=share * cuts[1].kernel) for share in (0.0, 0.75)]
    nothing, most = recover_lib.replace.layer_errors(run, {0: scaled}, images)[0]
    assert (nothing.inside, nothing.everywhere) == pytest.approx((1, 1)) and most.inside == pytest.approx(0.25)


@pytest.mark.slow
def test_a_layer_replaced_is_the_network_with_a_convolution_there():
    run = untrained()
    images = load_with_test_set(run.config.data).test_images[:40]
    value = np.asarray(run.params["layer_1"]["attention"]["value"]["kernel"])
    kernels = np.random.default_rng(0).random((9, 7, 7))
    cut = recover_lib.Layer(kernels, value).cut(Window(-1, -1, 3))
    config = replaced_config(run.config, {1})
    assert config.model.layer == ("attention", "convolution") and config.epochs == 1
    network = create_model(config.model)
    theirs = run._replace(model=network, params=replaced_params(run.params, {1: cut}), config=config)
    np.testing.assert_allclose(logits(run, images, replacing({1: cut})), logits(theirs, images), atol=1e-4)


def test_a_network_that_has_no_heads_left_is_trained_without_drawing_them():
    run = untrained(**{"figures.every_epochs": 1})
    assert not has_heads(create_experiment(replaced_config(run.config, {0, 1}), run.spec).model_config)


def test_windows_anywhere_are_convolved_with():
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 1))
    for window in (Window(-1, -1, 3), Window(2, -4, 2), Window(-3, 1, 1)):
        kernel = np.random.default_rng(0).normal(size=(window.side, window.side, 1, 1)).astype(np.float32)
        y = recover_lib.replace.convolve(x, Cut(window, kernel))
        padded = np.pad(np.asarray(x)[0, :, :, 0], 8)
        for i in range(4):
            for j in range(5):
                top, left = i + window.top + 8, j + window.left + 8
                seen = padded[top : top + window.side, left : left + window.side]
                np.testing.assert_allclose(y[0, i, j, 0], (seen * kernel[:, :, 0, 0]).sum(), atol=1e-5)


def test_queries_see_a_whole_window_where_it_is_inside():
    assert sees_all(Window(-1, -1, 3), 4, 5).sum() == 2 * 3
    assert sees_all(Window(0, 2, 1), 4, 5).sum() == 4 * 3
    assert not sees_all(Window(-2, -2, 5), 4, 5).any()


@pytest.fixture
def three_alone(monkeypatch):
    """Windows of 3x3 alone, which take a quarter of the time."""
    monkeypatch.setattr(recover_lib, "SIDES", (3,))


@pytest.mark.slow
def test_content_is_told_from_position(three_alone):
    found = recover(untrained(learned_content), 30)
    assert len(found["layers"]) == 2
    for layer in found["layers"]:
        assert layer["images"] == 30
        for head in layer["heads"]:
            assert head["by_content"] > 1e-4 and "outside" not in head
            assert head["by_shift"] + head["by_place"] + head["by_content"] == pytest.approx(1)


@pytest.mark.slow
def test_centers_spreads_and_gates_are_those_of_the_parameters(three_alone):
    run = untrained(gated, **{"model.init": "grid", "model.init_spread": 2.0})
    for layer in recover(run, 10)["layers"]:
        assert [tuple(head["center"]) for head in layer["heads"]] == [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        assert [head["spread"] for head in layer["heads"]] == pytest.approx([2] * 9)
        assert [head["gate"] for head in layer["heads"]] == pytest.approx([1 / (1 + np.exp(-1))] * 9)
        assert all("outside" not in head for head in layer["heads"])
    run = untrained(quadratic_generalized)
    layer = run.params["layer_0"]["attention"]
    layer["spreads"] = np.broadcast_to(np.diag([2.0, 8.0]).astype(np.float32), layer["spreads"].shape)
    first, _ = recover(run, 10)["layers"]
    assert [head["spread"] for head in first["heads"]] == pytest.approx([4] * 9)  # the geometric mean


@pytest.mark.slow
def test_tables_that_layers_share_are_each_layers(three_alone):
    found = recover(untrained(learned, **{"model.share_tables": True}), 10)
    outside = [head["outside"] for layer in found["layers"] for head in layer["heads"]]
    assert len(outside) == 18 and min(outside) > 0


@pytest.mark.slow
def test_a_network_with_layers_replaced_trains_on_and_goes_on_where_it_stopped(tmp_path):
    run = load_run(program.WORKDIRS / "quadratic")
    value = np.asarray(run.params["layer_0"]["attention"]["value"]["kernel"])
    cut = recover_lib.Layer(np.full((len(value), 7, 7), 1 / 49), value).cut(Window(-1, -1, 3))
    tuned = tuned_run(run, {0: cut}, epath.Path(tmp_path))
    assert tuned.config.epochs == 1 and tuned.step == 1_437 // run.config.batch_size
    kernel = tuned.params["layer_0"]["convolution"]["convolution"]["kernel"]
    assert not np.allclose(kernel, cut.kernel)
    shutil.rmtree(tmp_path / "tuned" / "metrics")
    again = tuned_run(run, {0: cut}, epath.Path(tmp_path))
    np.testing.assert_array_equal(again.params["layer_0"]["convolution"]["convolution"]["kernel"], kernel)
    other = cut._replace(kernel=cut.kernel + 0.01)
    for of_another, its_cut in ((run, other), (untrained(learned), cut)):
        with pytest.raises(UserError, match=r"was made from another network, .* or name another --out"):
            tuned_run(of_another, {0: its_cut}, epath.Path(tmp_path))


@pytest.mark.slow
def test_a_start_that_was_cut_short_is_made_again(tmp_path):
    run, out = load_run(program.WORKDIRS / "quadratic"), epath.Path(tmp_path)
    value = np.asarray(run.params["layer_0"]["attention"]["value"]["kernel"])
    cut = recover_lib.Layer(np.full((len(value), 7, 7), 1 / 49), value).cut(AROUND_QUERY)
    (out / "start" / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    assert tuned_run(run, {0: cut}, out).step > 0


@pytest.mark.slow
def test_runs_without_attention_are_refused():
    with pytest.raises(UserError, match="config.model.name is resnet18; recover reads runs of attention models"):
        recover(load_run(program.WORKDIRS / "resnet18"), 10)
    with pytest.raises(UserError, match="no attention layers with heads"):
        recover(untrained(**{"model.layer": "convolution"}), 10)


# The report


def maps_report():
    maps = np.random.default_rng(0).exponential(size=(3, 2, 4, 5, 4, 5))
    return recover_maps(Maps([maps / maps.sum((-2, -1), keepdims=True)] * 2))


def test_the_text_names_layers_heads_and_shares():
    text = report_lib.describe(maps_report())
    assert text.count("4x5 grid, maps of 3 images") == 2 and "99% in" in text and "test accuracy" not in text


def test_the_text_names_heads_that_share_a_target_or_mirror_each_other_and_windows_that_fit_nowhere():
    report = maps_report()
    window = {"side": 5, "top": -2, "left": -2, "energy": 1.0, "queries": 0, "inside": None, "everywhere": 0.5}
    report["layers"][1] |= {"sharing": [(0, 3)], "mirrored": [(0, 4)], "windows": [window]}
    text = report_lib.describe(report)
    assert "\nheads 0, 3 share a target\nheads 0 and 4 mirror each other\n" in text
    assert text.splitlines()[-1].split() == ["5x5", "-2,", "-2", "100.0%", "none", "0", "0.500"]


def test_json_holds_what_the_text_says_without_arrays():
    (first, _) = json.loads(report_lib.as_json(maps_report()))["layers"]
    assert first["grid"] == [4, 5] and len(first["heads"]) == 2 and "kernels" not in first
    assert set(first["heads"][0]) >= {"peak", "peak_shift", "windows", "by_content", "target"}


def test_the_figure_shows_each_head(tmp_path):
    report_lib.write(maps_report(), epath.Path(tmp_path) / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"recover.txt", "recover.json", "recover.png"}
    assert (tmp_path / "report" / "recover.png").read_bytes().startswith(b"\x89PNG")


command = functools.partial(program.run_module, "attn_cnn.convolution", "recover")


@pytest.mark.slow
def test_accuracy_after_an_epoch_of_training_stands_beside_that_before(three_alone, tmp_path, monkeypatch):
    run, asked = load_run(program.WORKDIRS / "quadratic"), []

    def says_always_three(run, cuts, folder):
        assert all(cut.window == AROUND_QUERY for cut in cuts.values())
        asked.append(set(cuts))
        params = jax.tree.map(np.zeros_like, run.params)
        params["classifier"]["bias"] = np.eye(10, dtype=np.float32)[3]
        return run._replace(params=params)

    monkeypatch.setattr(recover_lib.replace, "tuned_run", says_always_three)
    accuracy = recover(run, 10, tune=epath.Path(tmp_path))["accuracy"]
    threes = np.mean(load_with_test_set(run.config.data).test_labels == 3)
    alone = dict.fromkeys(accuracy["replaced"][0]["alone"], threes)
    around = accuracy["around_query"]
    assert around["after"] == {"alone": alone, "all": threes} and accuracy["as_trained"] != threes
    assert asked == [*({layer} for layer in map(int, alone)), set(map(int, alone))]
    assert around["before"].keys() == around["after"].keys() and around["before"]["all"] != threes
    text = report_lib.describe({"layers": [], "accuracy": accuracy})
    assert [line.count("around the query") for line in text.splitlines()[-2:]] == [1, 1]
    assert text.splitlines()[-1].split()[:7] == ["3x3", "around", "the", "query,", "an", "epoch", "later"]


def test_layers_are_replaced_one_alone_and_then_all_by_windows_of_each_side(monkeypatch):
    monkeypatch.setattr(recover_lib.replace, "replacing", lambda cuts: cuts)
    monkeypatch.setattr(recover_lib, "logits", lambda run, images, cuts: cuts)
    seen = []
    monkeypatch.setattr(recover_lib, "accuracy", lambda cuts, labels: seen.append(cuts) or float(len(seen)))
    cuts = {
        number: [Cut(Window(0, 0, side), np.zeros((side, side, 1, 1))) for side in sides]
        for number, sides in {0: (1, 3), 2: (1, 3, 5)}.items()  # the grid of layer 0 has no room for more
    }
    run = untrained()
    found = recover_lib.accuracies(run, load_with_test_set(run.config.data), cuts)
    sides = [{number: cut.window.side for number, cut in replaced.items()} for replaced in seen]
    assert sides == [{}, {0: 1}, {2: 1}, {0: 1, 2: 1}, {0: 3}, {2: 3}, {0: 3, 2: 3}, {2: 5}]
    assert found == {
        "as_trained": 1.0,
        "replaced": [
            {"side": 1, "alone": {"0": 2.0, "2": 3.0}, "all": 4.0},
            {"side": 3, "alone": {"0": 5.0, "2": 6.0}, "all": 7.0},
            {"side": 5, "alone": {"2": 8.0}, "all": None},
        ],
    }
    text = report_lib.describe({"layers": [], "accuracy": found})
    assert text.splitlines()[-1].split() == ["5x5", "none", "8.0000", "none"]


def test_before_and_after_the_epoch_the_same_layers_are_replaced_by_the_same_windows(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(recover_lib.replace, "replacing", lambda cuts: ("before", cuts))
    monkeypatch.setattr(recover_lib.replace, "tuned_run", lambda run, cuts, out: run._replace(step=("after", cuts)))
    monkeypatch.setattr(recover_lib, "logits", lambda run, images, replaced=None: replaced or run.step)
    monkeypatch.setattr(recover_lib, "accuracy", lambda found, labels: seen.append(found) or float(len(seen)))
    run = untrained()
    test, cut = load_with_test_set(run.config.data), Cut(AROUND_QUERY, np.zeros((3, 3, 1, 1)))
    found = recover_lib.around_query_accuracies(run, test, {0: cut, 2: cut}, epath.Path(tmp_path))
    sets = [{0: cut}, {2: cut}, {0: cut, 2: cut}]
    assert seen == [("before", cuts) for cuts in sets] + [("after", cuts) for cuts in sets]
    assert found["before"] == {"alone": {"0": 1.0, "2": 2.0}, "all": 3.0}
    found = recover_lib.around_query_accuracies(run, test, {0: cut, 2: None}, epath.Path(tmp_path))
    assert found["before"]["all"] is found["after"]["all"] is None and set(found["after"]["alone"]) == {"0"}


@pytest.mark.slow
def test_the_command_reports_a_run_with_layers_of_few_and_no_heads(tmp_path):
    done = command(f"--workdir={program.WORKDIRS / 'quadratic_heads_by_layer'}", f"--out={tmp_path}", "--images=20")
    assert done.returncode == 0, done.stderr
    assert "layer 0, 4x4 grid" in done.stdout and "layer 1," not in done.stdout
    assert (tmp_path / "recover.txt").read_text() == done.stdout
    found = json.loads((tmp_path / "recover.json").read_text())
    assert [layer["layer"] for layer in found["layers"]] == [0, 2]
    accuracy = found["accuracy"]
    assert [r["side"] for r in accuracy["replaced"]] == [1, 3, 5, 7]
    assert all(set(r["alone"]) == {"0", "2"} and 0 <= r["all"] <= 1 for r in accuracy["replaced"])


@pytest.mark.slow
def test_the_command_reports_anyones_maps(tmp_path):
    maps = np.zeros((1, 1, 4, 4, 4, 4), np.float32)
    for i, j in np.ndindex(4, 4):
        maps[0, 0, i, j, i, min(j + 1, 3)] = 1
    write(epath.Path(tmp_path) / "vit.npz", Maps([maps]))
    done = command(f"--maps={tmp_path / 'vit.npz'}")
    assert done.returncode == 0, done.stderr
    (head,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["0"]]
    # A quarter of the queries look at themselves.
    assert head[:11] == ["0", "0,", "1", "1.000", "0.00,", "0.80", "0.00,", "0.40", "1x1", "2x2", "2x2"]
