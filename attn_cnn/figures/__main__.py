"""The paper's figures of any run, or of anyone's attention maps, as PNG and SVG.

    python -m attn_cnn.figures --workdir=RUN [--workdir=RUN2 ...]
    python -m attn_cnn.figures --maps=vit.npz

Figures of a run land in its `figures/`, those of a file vit.npz beside it in `vit_figures/`:

    attention   where each head looks from a query pixel: contours of 50% and 90% of its probability
    centers     centers and spreads over training, and the same as an animation
    maps        layers x heads: of an image, averaged over images, from several query pixels; parts of content scores
    curves      learning curves, of all runs together, in the first one's folder
    theory      softmax(-a |d - D|^2) for several a, in the first run's folder
    spread      nonlocality and entropy by layer

Without --figures all are drawn, and it is said which could not be. `attn_cnn/maps.py` documents the file of maps.
"""

import logging
from collections.abc import Callable, Iterator

import matplotlib.figure
from absl import flags
from etils import epath

from attn_cnn import cli, drawing, paths
from attn_cnn import maps as maps_lib
from attn_cnn.errors import UserError
from attn_cnn.figures import centers, curves, maps, spread, theory
from attn_cnn.figures.sources import FileSource, Query, RunSource, Source
from attn_cnn.heads import history, views
from attn_cnn.model import has_heads
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.runs import load_run

log = logging.getLogger("attn_cnn")

FLAGS = flags.FLAGS
OF_RUNS = ("centers", "curves", "theory")  # which maps alone do not give
FIGURES = ("attention", "centers", "maps", "curves", "theory", "spread")

Drawn = Iterator[tuple[str, matplotlib.figure.Figure | bytes]]  # names of files without suffix; bytes are a WebP's


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_multi_string("workdir", [], "The workdir of a run; again, for more.")
    flags.DEFINE_string("maps", None, "A file of attention maps in the place of runs.")
    flags.DEFINE_list("figures", [], f"Which: {','.join(FIGURES)}; without it, all.")
    flags.DEFINE_multi_string("query", [], "A query pixel of the grid, as in 8,8; again, for more side by side.")
    flags.DEFINE_string("image", "0", "The image under the maps: its number in the test set, or a picture's path.")
    flags.DEFINE_integer("images", 100, "How many test images, or images of the file, to average over.", lower_bound=1)
    cli.define_step()


def check_flags() -> None:
    """Raises UserError if flags are missing, unknown, or contradict each other."""
    cli.check_source("a figure", of_runs=("step",))
    if unknown := [name for name in FLAGS.figures if name not in FIGURES]:
        raise UserError(f"--figures names {unknown[0]!r}; the figures are {', '.join(FIGURES)}.")
    if FLAGS.maps is not None and (of_runs := [name for name in FLAGS.figures if name in OF_RUNS]):
        raise UserError(f"--figures names {of_runs[0]}, which goes with --workdir, not with --maps.")


def parse_queries(words: list[str], grid: tuple[int, int]) -> list[Query]:
    """Returns the query pixels that words as 8,8 name; without words, the middle, a corner and an edge.

    Raises:
      UserError: a word names no pixel of the grid.
    """
    if not words:
        middle = views.middle(grid)
        return list(dict.fromkeys([middle, (0, 0), (middle[0], grid[1] - 1)]))
    queries = []
    for word in words:
        numbers = [int(part) for part in word.split(",") if part.strip().isdigit()]
        inside = len(numbers) == 2 and all(n < side for n, side in zip(numbers, grid, strict=True))
        if word.count(",") != 1 or not inside:
            raise UserError(
                f"--query is {word!r}; it must be row,column within the {grid[0]}x{grid[1]} grid, as in 0,0."
            )
        queries.append((numbers[0], numbers[1]))
    return queries


def attention_of(source: Source, queries: list[Query]) -> Drawn:
    """Yields the contours of each head from the first query pixel."""
    yield "attention", drawing.attention(source.views(queries[0]))


def maps_of(source: Source, queries: list[Query]) -> Drawn:
    """Yields maps of the image, of the average, from all query pixels, and the parts of content scores."""
    which, (first, *_) = FLAGS.image, queries
    # Heads of a run that see no content would seem to look at what lies underneath; it lies there if it is asked for.
    shown = source.needs_x or FLAGS["image"].present or isinstance(source, FileSource)
    image = source.image(which) if shown else None
    for name, some in (("maps", [first]), ("maps_queries", queries)):
        if name == "maps" or len(queries) > 1:
            text = maps.caption(some, 1, image is not None)
            yield name, maps.draw(source.of_image(which, some), image, text)
    if source.needs_x:
        average = source.average([first])
        number = max(len(seen.probabilities) for seen in average.values())
        yield "maps_average", maps.draw(average, None, maps.caption([first], number, False))
    if isinstance(source, RunSource) and image is not None:
        for layer, (parts, query) in source.parts(image, first).items():
            if parts.content is not None:
                yield f"maps_parts_layer_{layer}", maps.draw_parts(parts, query, layer)


def centers_of(workdir: epath.Path) -> Drawn:
    """Yields centers and spreads over training, and the animation."""
    numbers = history.read(workdir)
    yield "centers", centers.draw(numbers)
    yield "centers", centers.animate(numbers)


def curves_of(workdirs: list[epath.Path]) -> Drawn:
    """Yields the learning curves of all runs, under the names by which their workdirs differ."""
    names = [workdir.name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = list(map(str, workdirs))
    yield "curves", curves.draw([curves.read(*run) for run in zip(workdirs, names, strict=True)])


def write(kind: str, drawn: Callable[[], Drawn], folder: epath.Path, explicit: bool) -> None:
    """Writes figures into a folder; where they cannot be drawn, says why, or raises where they were asked for.

    Raises:
      UserError: see above, or a file cannot be written.
    """
    try:
        for name, figure in drawn():
            if isinstance(figure, bytes):
                paths.write(folder / f"{name}.webp", figure)
                continue
            for suffix in ("png", "svg"):
                drawing.save(figure, folder / f"{name}.{suffix}")
            print(folder / f"{name}.png")
    except UserError as error:
        if explicit:
            raise
        log.info("No %s in %s: %s", kind, folder, error)


def figures_of(source: Source) -> dict[str, Callable[[], Drawn]]:
    """Returns what draws the figures that any maps have, by their names."""
    queries = parse_queries(FLAGS.query, source.grid)
    return {
        "attention": lambda: attention_of(source, queries),
        "maps": lambda: maps_of(source, queries),
        "spread": lambda: iter([("spread", spread.draw(source.numbers()))]),
    }


def figures_of_run(workdir: epath.Path) -> dict[str, Callable[[], Drawn]]:
    """Returns what draws those figures of a run; nothing where it has no heads and no figures were asked for by name.

    Raises:
      UserError: there is no run, or it has no heads and figures were asked for.
    """
    run = load_run(workdir, cli.step())
    if not FLAGS.figures and not has_heads(run.config.model):
        log.info("No attention, maps and spread in %s: the run has no heads.", workdir)
        return {}
    return figures_of(RunSource(run, FLAGS.images))


def main(_):
    check_flags()
    todo = []
    if FLAGS.maps is not None:
        path = paths.resolve(FLAGS.maps, "--maps")
        todo.append((figures_of(FileSource(maps_lib.read(path), FLAGS.images)), path.parent / f"{path.stem}_figures"))
    workdirs = list(map(workdir_lib.open_workdir, FLAGS.workdir))
    for workdir in workdirs:
        drawn = {"centers": lambda workdir=workdir: centers_of(workdir)}
        if set(FLAGS.figures or FIGURES) - set(OF_RUNS):
            drawn |= figures_of_run(workdir)
        if workdir == workdirs[0]:
            drawn["curves"] = lambda: curves_of(workdirs)
            drawn["theory"] = lambda: iter([("theory", theory.draw())])
        todo.append((drawn, workdir / "figures"))
    for drawn, folder in todo:
        for kind in FIGURES:
            if kind in drawn and kind in (FLAGS.figures or FIGURES):
                write(kind, drawn[kind], folder, explicit=bool(FLAGS.figures))


def command() -> None:
    """Runs this command from a terminal."""
    define_flags()
    cli.run(main, config=False)


if __name__ == "__main__":
    command()
