"""The interactive page of runs: python -m attn_cnn.explorer --workdir=RUN [--workdir=RUN2 ...] --out=page.html

It is one file that opens from disk. `--maps=FILE.npz` in the place of workdirs makes one of the attention maps of any
vision transformer (`attn_cnn/maps.py` says how such a file looks). `--serve` also serves it, on this machine alone.
"""

import http.server

from absl import flags
from etils import epath

from attn_cnn import cli, paths


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
    cli.check_source("the page", of_runs=("weights", "step"))
    step = cli.step()
    from attn_cnn.explorer import page  # slow to load, and not needed to find a mistake in the flags

    if given.maps is not None:
        text = page.of_maps(given.maps, given.images)
    else:
        text = page.of_runs(given.workdir, given.images, given.weights, step)
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
