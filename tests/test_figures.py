"""Figures of runs and of anyone's maps show what the model computes, and the command says what it lacks."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import program
import pytest
from etils import epath
from golden import Golden, assert_close, small_model
from matplotlib.patches import Ellipse

from attn_cnn import drawing, maps, regions
from attn_cnn.attention import attention_maps
from attn_cnn.encodings import ENCODINGS, Content
from attn_cnn.errors import UserError
from attn_cnn.figures import __main__ as figures
from attn_cnn.figures import centers, curves, spread, theory
from attn_cnn.figures.sources import FileSource, RunSource, in_grid
from attn_cnn.heads import history, measure, views
from attn_cnn.maps import Maps
from attn_cnn.model import create_model
from attn_cnn.training import metrics
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment, random_state
from attn_cnn.training.runs import load_run
from configs import gated, learned, learned_content, quadratic, resnet18

run = functools.partial(program.run_module, "attn_cnn.figures")


def new_run(workdir, experiment=quadratic, **changes):
    """Makes a run that has done no step; returns it as it is opened."""
    if experiment is not resnet18:
        changes = {"model.layers": 2, "model.heads": 4, **changes}
    config = program.tiny_config(experiment, **changes)
    created = create_experiment(config)
    workdir_lib.create(epath.Path(workdir), created.config, created.spec, random_state(created))
    return load_run(workdir)


def random_maps(images=3, heads=4, height=4, width=6, channels=3):
    values = np.random.default_rng(0).exponential(size=(2, images, heads, height, width, height, width))
    pictures = np.random.default_rng(1).integers(0, 256, (images, 2 * height, 2 * width, channels), np.uint8)
    return Maps(list(values / values.sum((-2, -1), keepdims=True)), pictures)


# --- What is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["quadratic", "learned_query", "learned_content", "learned_content_position", "gated"]
)
def test_the_softmax_of_the_total_score_is_the_probability_and_parts_add_up(encoding):
    images = Golden("quadratic").images
    model = create_model(small_model(encoding, layers=1))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    (A,) = jax.jit(lambda p, x: attention_maps(model, p, x))(params, images)
    (parts,) = jax.jit(lambda p, x: attention_maps(model, p, x, parts=True))(params, images)
    assert_close(jax.nn.softmax(parts.total, (-2, -1)), A)
    if encoding == "gated":
        assert_close(parts.total, jnp.log(A))
    elif parts.content is None:
        assert encoding in ("quadratic", "learned_query")
        assert_close(parts.total, parts.position)
    else:
        assert_close(parts.total, parts.position + parts.content)


def test_the_log_of_a_gated_probability_is_finite_where_the_probability_is_not_above_0():
    x = jnp.zeros((4, 4, 2)).at[0, 0].set(1e3)
    gated = ENCODINGS["gated"](
        position=ENCODINGS["quadratic"](jnp.zeros((1, 2)), jnp.array([30.0])),
        content=Content(jnp.ones((1, 2, 2)), jnp.zeros((1, 2))),
        gates=jnp.zeros(1),
    )
    assert float(gated.probabilities(x).whole().values.min()) == 0
    assert np.isfinite(gated.parts(x).total).all()


@pytest.mark.slow
def test_a_run_is_seen_from_a_query_as_its_attention_maps_say(tmp_path):
    source = RunSource(new_run(tmp_path / "run", learned_content), 12)
    queries = [(2, 2), (0, 3)]
    seen = source.average(queries)
    x = (jnp.asarray(source.images, jnp.float32) / 255 - jnp.array(source.run.mean)) / jnp.array(source.run.std)
    A = attention_maps(source.run.model, source.run.params, x)
    for number, layer in enumerate(A):
        for place, (row, column) in enumerate(queries):
            assert_close(seen[number].probabilities[:, place], layer[:, :, row, column])
    assert_close(np.array(source.views((2, 2))[1].heads), A[1][:, :, 2, 2].mean(0))


@pytest.mark.slow
def test_a_query_of_a_grid_that_halves_is_the_pixel_that_covers_it(tmp_path):
    changes = {"model.layers": 3, "model.merge_before": (1,), "model.hidden_size": (16, 24, 24), "model.mlp_size": 16}
    source = RunSource(new_run(tmp_path / "run", learned, **changes), 1)
    seen = source.average([(3, 1)])
    assert [layer.queries for layer in seen.values()] == [[(3, 1)], [(1, 0)], [(1, 0)]]
    assert [layer.probabilities.shape for layer in seen.values()] == [(1, 1, 4, 4, 4), (1, 1, 4, 2, 2), (1, 1, 4, 2, 2)]
    numbers = measure.measure(source.run.model, source.run.params, jnp.zeros((1, 8, 8, 1)), central=True)
    of_numbers = views.of_numbers(measure.stacked(numbers, 3))
    assert of_numbers.keys() == {0, 1, 2}
    for number, view in source.views((2, 2)).items():
        assert (of_numbers[number].grid, of_numbers[number].query) == (view.grid, view.query)
        assert_close(np.array(of_numbers[number].heads), np.array(view.heads))


def test_pixels_of_another_grid_cover_the_same_place():
    assert [in_grid((row, 5), (8, 8), (4, 4)) for row in range(8)] == [(row // 2, 2) for row in range(8)]
    assert in_grid((0, 1), (2, 2), (8, 4)) == (2, 3)


@pytest.mark.slow
def test_heads_that_are_gaussians_have_the_same_contours_from_numbers_and_from_the_encoding(tmp_path):
    source = RunSource(new_run(tmp_path / "run"), 1)
    numbers = measure.measure(source.run.model, source.run.params, jnp.zeros((1, 8, 8, 1)))
    of_numbers = views.of_numbers(measure.stacked(numbers, 2))
    assert of_numbers.keys() == {0, 1}
    for number, view in source.views((2, 2)).items():
        rows, columns = np.mgrid[-2:2:0.25, -2:2:0.25]
        for ours, theirs in zip(view.heads, of_numbers[number].heads, strict=True):
            assert_close(ours(rows, columns), theirs(rows, columns))


def test_the_shown_image_of_a_file_has_its_own_maps_and_the_average_is_over_all():
    source = FileSource(random_maps(), 100)
    everything = source.average([(1, 2)])[0].probabilities
    np.testing.assert_array_equal(source.of_image("2", [(1, 2)])[0].probabilities, everything[2:])
    first = FileSource(random_maps(), 1)
    np.testing.assert_array_equal(first.average([(1, 2)])[0].probabilities, everything[:1])
    np.testing.assert_array_equal(first.of_image("2", [(1, 2)])[0].probabilities, everything[2:])
    np.testing.assert_allclose(np.array(source.views((1, 2))[0].heads), everything[:, 0].mean(0))
    with pytest.raises(UserError, match=r"--image is 3, but the images are 0 to 2"):
        source.image("3")
    with pytest.raises(UserError, match=r"--image is 'cat.png', but the maps of a file are of its own images"):
        source.image("cat.png")


def test_numbers_of_maps_are_those_of_the_attention_that_made_them():
    layer = np.zeros((1, 1, 5, 5, 5, 5))
    for i in range(5):
        for j in range(5):
            layer[0, 0, i, j, i, min(j + 1, 4)] = 1  # one to the right, but at the border
    numbers = measure.of_maps(layer)
    np.testing.assert_allclose(numbers["nonlocality"], [0.8], rtol=1e-6)
    np.testing.assert_array_equal(numbers["most_attended_shift"], [[0, 1]])
    np.testing.assert_allclose(numbers["entropy"], [0], atol=1e-6)


def test_the_panels_of_the_theory_are_their_formula():
    alphas, (row, column) = (0.1, 2.0), (-1.0, 2.0)
    d = np.mgrid[-3:4, -3:4]
    for alpha, panel in zip(alphas, theory.probabilities(alphas, (row, column), 7), strict=True):
        expected = np.exp(-alpha * ((d[0] - row) ** 2 + (d[1] - column) ** 2))
        assert_close(panel, expected / expected.sum())


def test_still_figures_of_training_begin_with_the_first_epoch_and_end_with_the_last():
    assert centers.chosen(1, 6) == [0]
    assert centers.chosen(5, 6) == [0, 1, 2, 3, 4]
    for epochs in (7, 60, 300):
        chosen = centers.chosen(epochs, 6)
        assert (chosen[0], chosen[-1]) == (0, epochs - 1) and len(chosen) <= 6
        assert np.all(np.diff(np.diff(chosen)) >= 0)


def test_the_papers_accuracy_stands_beside_runs_at_its_scale_alone():
    assert curves.paper_accuracy(quadratic.get_config()) == 0.938
    assert curves.paper_accuracy(learned_content.get_config()) == 0.871
    assert curves.paper_accuracy(gated.get_config()) is None
    assert curves.paper_accuracy(quadratic.get_config("small")) is None
    config = quadratic.get_config()
    config.model.heads = 16
    assert curves.paper_accuracy(config) is None
    config = resnet18.get_config()
    assert curves.paper_accuracy(config) == curves.PAPER["resnet18"]
    config.model.width = 8
    assert curves.paper_accuracy(config) is None


def test_a_dozen_runs_have_curves_that_are_told_apart():
    runs = [curves.Curves(f"run {n}", np.ones((2, 3)), np.ones((2, 3)), "test", 0.9) for n in range(12)]
    loss, accuracy = curves.draw(runs).axes
    styles = {(line.get_color(), line.get_linestyle()) for line in loss.lines}
    assert len(styles) == 12 and "--" not in {line for _, line in styles}  # dashes are the paper's
    assert {(line.get_color(), line.get_linestyle()) for line in accuracy.lines} >= styles


# --- Drawing ----------------------------------------------------------------------------------------------------------


def some_views(heads):
    gaussians = [views.gaussian(np.array([h - 1.0, 0.5]), np.eye(2)) for h in range(heads)]
    return {0: views.LayerView((6, 8), (3, 4), gaussians), 2: views.LayerView((6, 8), (3, 4), gaussians[:1])}


def test_every_head_has_both_contours_in_its_colour_and_the_query_a_black_square():
    figure = drawing.attention(some_views(3))
    panel = figure.axes[0]
    colours = [line.get_color() for line in panel.lines]
    assert colours == [drawing.head_colour(head) for head in (0, 0, 1, 1, 2, 2)]
    assert [line.get_linestyle() for line in panel.lines[:2]] == ["-", "--"]  # matplotlib's name for any dashes
    (square,) = [patch for patch in panel.patches if patch.get_facecolor()[:3] == (0, 0, 0)]
    assert (square.get_xy(), square.get_width(), square.get_height()) == ((3.5, 2.5), 1, 1)


def test_no_two_of_the_papers_nine_heads_have_a_colour_that_the_colour_blind_confuse():
    """Simulates deuteranopia (Vienot et al. 1999) in linear RGB."""
    deuteranopia = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in drawing.HEADS]) / 255
    seen = (np.clip(colours**2.2 @ deuteranopia.T, 0, 1)) ** (1 / 2.2)
    distances = np.linalg.norm(seen[:, None] - seen, axis=-1)[np.triu_indices(len(seen), 1)]
    assert distances.min() > 0.08


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_files_are_the_same_to_the_byte(kind):
    def again():
        return drawing.encoded(drawing.attention(some_views(2)), kind)

    assert again() == again()


@pytest.mark.slow
def test_the_pixels_that_are_drawn_are_the_fewest_that_hold_the_share():
    P = np.random.default_rng(0).dirichlet(np.ones(12)).reshape(3, 4)
    figure = drawing.attention({0: views.LayerView((3, 4), (1, 2), [P])})
    (image,) = figure.axes[0].images
    few, many = (regions.fewest_pixels(P, share) for share in regions.SHARES)
    np.testing.assert_array_equal(image.get_array()[..., 3] > 0, many.held)
    assert figure.axes[0].get_title() == f"{few.mass:.0%}, {many.mass:.0%}"
    dark = np.allclose(
        image.get_array()[few.held][:, :3], [int(drawing.HEADS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    )
    assert dark


@pytest.mark.slow
def test_boxes_are_drawn_for_every_layer():
    numbers = {layer: measure.of_maps(maps) for layer, maps in enumerate(random_maps().layers)}
    figure = spread.draw(numbers)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1"]


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_run_has_all_figures_and_maps_of_a_file_those_that_maps_give(tmp_path):
    workdir = tmp_path / "run"
    changes = ("--config.epochs=2", "--config.checkpoint.every_epochs=1", "--config.model.heads=4")
    program.run(f"--workdir={workdir}", *changes, config="configs/learned_content.py:digits")
    done = run(f"--workdir={workdir}", "--images=4", "--query=1,2", "--query=0,0")
    assert done.returncode == 0, done.stderr
    names = ["attention", "centers", "curves", "maps", "maps_average", "maps_parts_layer_0", "maps_queries", "spread"]
    expected = {f"{name}.{kind}" for name in [*names, "theory"] for kind in ("png", "svg")} | {"centers.webp"}
    assert {path.name for path in (workdir / "figures").iterdir()} == expected
    with PIL.Image.open(workdir / "figures" / "centers.webp") as animation:
        assert animation.n_frames == 2
    before = (workdir / "figures" / "attention.svg").read_bytes()
    run(f"--workdir={workdir}", "--images=4", "--query=1,2", "--figures=attention", check=True)
    assert (workdir / "figures" / "attention.svg").read_bytes() == before

    maps.write(epath.Path(tmp_path) / "vit.npz", random_maps())
    done = run(f"--maps={tmp_path / 'vit.npz'}", "--image=1")
    assert done.returncode == 0, done.stderr
    written = {path.stem for path in (tmp_path / "vit_figures").iterdir()}
    assert written == {"attention", "maps", "maps_average", "maps_queries", "spread"}


@pytest.mark.slow
def test_training_writes_where_heads_look_every_so_many_epochs_and_the_numbers_are_those_without(tmp_path):
    changes = ("--config.epochs=4", "--config.model.heads=4", "--config.checkpoint.every_epochs=2")
    for name, every in (("drawn", 2), ("plain", 0)):
        program.run(
            f"--workdir={tmp_path / name}",
            *changes,
            f"--config.figures.every_epochs={every}",
            config="configs/learned.py:digits",
        )
    files = [list((tmp_path / name / "metrics").glob("events*")) for name in ("drawn", "plain")]
    tags = [[(e.step, v.tag) for e in metrics._events(epath.Path(file)) for v in e.summary.value] for (file,) in files]
    assert [step for step, tag in tags[0] if tag == "heads/attention"] == [28, 56]
    assert [tag for tag in tags[0] if tag[1] != "heads/attention"] == tags[1]
    drawn, plain = (history.read(tmp_path / name) for name in ("drawn", "plain"))
    assert drawn.keys() == plain.keys()
    for name, array in drawn.items():
        np.testing.assert_array_equal(array, plain[name])


@pytest.mark.slow
def test_what_cannot_be_drawn_is_said_and_is_an_error_where_it_was_asked_for(tmp_path):
    new_run(tmp_path / "run")
    done = run(f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0 and "No centers in" in done.stderr and "heads.npz does not exist" in done.stderr
    done = run(f"--workdir={tmp_path / 'run'}", "--figures=centers")
    assert done.returncode == 1 and "heads.npz does not exist" in done.stderr

    new_run(tmp_path / "resnet", resnet18)
    done = run(f"--workdir={tmp_path / 'resnet'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0 and "resnet: the run has no heads" in done.stderr
    assert (tmp_path / "run" / "figures" / "attention.png").exists()
    done = run(f"--workdir={tmp_path / 'resnet'}", "--figures=attention")
    assert done.returncode == 1 and "model without heads" in done.stderr


def test_query_pixels_are_read_or_the_mistake_is_named():
    assert figures.parse_queries([], (4, 6)) == [(2, 3), (0, 0), (2, 5)]
    assert figures.parse_queries([], (1, 1)) == [(0, 0)]
    assert figures.parse_queries(["3,5", "0, 1"], (4, 6)) == [(3, 5), (0, 1)]
    for word in ("4,0", "0", "0,1,2", "-1,0", "a,b", "1,,2"):
        with pytest.raises(UserError, match=f"--query is '{word}'; it must be row,column within the 4x6 grid"):
            figures.parse_queries([word], (4, 6))


def test_an_image_is_written_as_it_was_drawn():
    figure = drawing.attention(some_views(1))
    image = drawing.pixels(figure)
    content = PIL.Image.open(io.BytesIO(drawing.encoded(figure, "png")))
    assert image.dtype == np.uint8 and image.shape[2] == 3
    assert content.size[0] / image.shape[1] == pytest.approx(1.5, abs=0.01)


def test_a_head_that_looks_at_one_pixel_is_a_point_there_though_it_cannot_look_so_from_the_border():
    """Numbers of an epoch and a layer of two heads on a 4x6 grid: one looks 1 up and 2 left, the other everywhere."""
    scores = {"row_scores": np.zeros((1, 1, 2, 7)), "column_scores": np.zeros((1, 1, 2, 11))}
    scores["row_scores"][0, 0, 0, 3 - 1] = scores["column_scores"][0, 0, 0, 5 - 2] = 100
    grid = np.broadcast_to([4.0, 6.0], (1, 1, 2, 2))
    means, covariances = centers.gaussians(scores | {"grid": grid})
    np.testing.assert_allclose(means[0, 0], [[-1, -2], [-0.5, -0.5]], atol=1e-6)
    np.testing.assert_allclose(covariances[0, 0], [np.zeros((2, 2)), np.diag([15 / 12, 35 / 12])], atol=1e-6)


@pytest.mark.slow
def test_heads_that_are_not_there_are_left_out_of_figures_of_training():
    """Numbers of 3 epochs, and of 3 layers with 4, 2 and no heads."""
    shapes = {"grid": (2,), "center": (2,), "precision": (2, 2)}
    values = {"grid": np.full(2, 8.0), "center": np.array([1.0, -2.0]), "precision": np.eye(2)}
    numbers = {name: np.broadcast_to(values[name], (3, 3, 4, *shape)).copy() for name, shape in shapes.items()}
    for array in numbers.values():
        array[:, 1, 2:] = array[:, 2] = np.nan
    numbers["epoch"] = np.arange(1, 4)
    panels = [axes for axes in centers.draw(numbers).axes if axes.patches]
    ellipses = [sum(isinstance(patch, Ellipse) for patch in axes.patches) for axes in panels]
    assert ellipses == [2 * 4] * 3 + [2 * 2] * 3
    seen = views.of_numbers({name: array[-1] for name, array in numbers.items()})
    assert {number: len(view.heads) for number, view in seen.items()} == {0: 4, 1: 2}
