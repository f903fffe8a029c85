"""The interactive page of runs: python -m attn_cnn.explorer --workdir=RUN [--workdir=RUN2 ...] --out=page.html

It is one file that opens from disk. `--maps=FILE.npz` in the place of workdirs makes one of the attention maps of any
vision transformer (`attn_cnn/maps.py` says how such a file looks). `--serve` also serves it, on this machine alone.
"""

import http.server
from collections.abc import Sequence

from absl import flags
from etils import epath

from attn_cnn import cli, paths
from attn_cnn.errors import UserError

INLINED_BYTES = 2 * 2**20  # of a network in single precision; a larger one takes --weights
OF_RUNS = ("weights", "step")


def page_of_runs(workdirs: Sequence[epath.PathLike], images: int, weights: bool, step: int | str) -> str:
    """Returns the page of the runs in `workdirs`.

    Args:
      workdirs: of one run or several.
      images: number of test images to show.
      weights: whether a network of more than `INLINED_BYTES` is part of the page, in half precision.
      step: which checkpoint, as `load_run` takes it.

    Raises:
      UserError: a run or its data cannot be read.
    """
    from attn_cnn.explorer import network, page, view  # not needed to find a mistake in the flags
    from attn_cnn.training.runs import load_run
    from attn_cnn.training.workdir import open_workdir

    views: list[view.View] = []
    networks: list[list[network.Step] | None] = []
    for workdir in map(open_workdir, workdirs):
        run = load_run(workdir, step)
        steps = network.steps(run)
        large = 4 * network.size(steps) > INLINED_BYTES
        views.append(view.of_run(run, workdir.name, images, steps, large))
        views[-1]["history"] = view.history(workdir)
        if any(layer["parameters"]["encoding"] == "maps" for layer in views[-1]["layers"]):
            print(f"{workdir}: the page cannot compute this encoding; it has its maps, and leaves the network out.")
            networks.append(None)
        elif large and not weights:
            print(f"{workdir}: the page leaves the network out, which is large; --weights puts it in.")
            networks.append(None)
        else:
            networks.append([page.in_half_precision(step) for step in steps] if large else steps)
    return page.build(views, networks)


def page_of_maps(file: epath.PathLike, images: int) -> str:
    """Returns the page of the attention maps in a file, of its first images.

    Raises:
      UserError: the maps cannot be read.
    """
    from attn_cnn import maps
    from attn_cnn.explorer import page, view

    path = paths.resolve(file, "--maps")
    return page.build([view.of_maps(path.name, maps.read(path), images)], [None])


def write(text: str, path: epath.Path) -> None:
    """Writes a page, and prints its size; raises UserError where it cannot be written."""
    paths.write(path, text.encode())
    print(f"{path}: {len(text) / 1e6:.1f} MB, to open in a browser.")


def server(text: str) -> http.server.ThreadingHTTPServer:
    """Returns a server of the page on 127.0.0.1, at a free port, that is yet to be started."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path.partition("?")[0] == "/"
            content = text.encode() if found else b"There is one page here: /"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8" if found else "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Keeps requests from the terminal."""

    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def main(_):
    given = flags.FLAGS
    if bool(given.workdir) == bool(given.maps):
        raise UserError("name runs, as in --workdir=runs/quadratic_digits, or a file of maps, as in --maps=maps.npz.")
    for name in OF_RUNS:
        if given.maps and given[name].value != given[name].default:
            raise UserError(f"--{name} goes with --workdir alone.")
    if given.maps:
        text = page_of_maps(given.maps, given.images)
    else:
        text = page_of_runs(given.workdir, given.images, given.weights, cli.step())
    write(text, paths.resolve(given.out, "--out"))
    if given.serve:
        with server(text) as serving:
            print(f"http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends it)", flush=True)
            serving.serve_forever()


def command() -> None:
    """Runs this command from a terminal."""
    flags.DEFINE_multi_string("workdir", [], "The workdir of a run; several times for several runs.")
    flags.DEFINE_string("maps", None, "A file of attention maps.")
    flags.DEFINE_string("out", "page.html", "The page to write.")
    flags.DEFINE_integer("images", 20, "Number of test images to show.", lower_bound=1, upper_bound=1000)
    flags.DEFINE_bool("weights", False, "Put large networks into the page too, in half precision.")
    flags.DEFINE_bool("serve", False, "Serve the page on this machine, and print its address.")
    cli.define_step()
    cli.run(main, config=False)


if __name__ == "__main__":
    command()
