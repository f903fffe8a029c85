"""The theorem as a command, in both directions.

    python -m attn_cnn.convolution express --workdir=runs/resnet18_small --out=runs/resnet18_attention
    python -m attn_cnn.convolution recover --workdir=runs/quadratic_small --out=reports/quadratic_small
    python -m attn_cnn.convolution recover --maps=vit.npz
    python -m attn_cnn.convolution moves --workdir=runs/resnet18_attention_on

`express` makes OUT a run with attention in the place of convolutions. `recover` prints how much of a convolution the
attention of a run, or of the maps in a file (`attn_cnn/maps.py`), is; OUT is a folder for the same as recover.txt,
recover.json and recover.png. `moves` prints where the heads of a network that was expressed as attention have gone.
"""

from absl import flags

from attn_cnn import cli, paths
from attn_cnn.convolution.theorem import EXACT_SPREAD
from attn_cnn.errors import UserError

FLAGS = flags.FLAGS
COMMANDS = ("express", "recover", "moves")
GOES_WITH = {
    "out": ("express", "recover"),
    "spread": ("express",),
    "maps": ("recover",),
    "images": ("recover",),
    "tune": ("recover",),
}


def define_flags() -> None:
    """Defines the flags of all commands."""
    flags.DEFINE_string("workdir", None, "The run's workdir.")
    flags.DEFINE_string("out", None, "express: the workdir to make. recover: a folder for the report.")
    spread = "express: the spread s of every head, in 1/pixels. At the default heads get no gradient, at 3.16 they do."
    flags.DEFINE_float("spread", EXACT_SPREAD, spread, lower_bound=0.01)
    flags.DEFINE_string("maps", None, "recover: a file of attention maps in the place of a run.")
    flags.DEFINE_integer("images", 500, "recover: test images to average maps and errors over.", lower_bound=1)
    flags.DEFINE_boolean("tune", False, "recover: also train networks with layers replaced for an epoch, in OUT.")
    cli.define_step()


def check_flags(command: str) -> None:
    """Raises UserError if a flag is missing or is one that the command ignores."""
    cli.check_command(command, COMMANDS, GOES_WITH)
    if command == "recover":
        cli.check_source(command, of_runs=("step", "images", "tune"))
    elif not FLAGS.workdir:
        raise UserError(f"{command} needs --workdir=RUN.")
    if FLAGS.out is None and (command == "express" or FLAGS.tune):
        example = "runs/resnet18_attention" if command == "express" else "reports/quadratic_small"
        raise UserError(f"--out is missing; name a folder to make, as in --out={example}.")


def express() -> None:
    """Makes the run and prints how it compares."""
    from attn_cnn.convolution import express as express_lib  # not needed to find a mistake in the flags

    print(express_lib.describe(express_lib.express(FLAGS.workdir, FLAGS.out, FLAGS.spread, cli.step())))
    print(f"\n{FLAGS.out} now holds the network as attention; --config.model.layer=attention goes with it.")


def recover() -> None:
    """Prints the report and, where there is an OUT, writes it there."""
    from attn_cnn import maps
    from attn_cnn.convolution import recover as recover_lib
    from attn_cnn.convolution import report
    from attn_cnn.training.runs import load_run

    out = None if FLAGS.out is None else paths.resolve(FLAGS.out, "--out")
    if FLAGS.maps is not None:
        found = recover_lib.recover_maps(maps.read(paths.resolve(FLAGS.maps, "--maps")))
    else:
        run = load_run(FLAGS.workdir, cli.step())
        found = recover_lib.recover(run, FLAGS.images, out / f"tuned_{run.step}" if out and FLAGS.tune else None)
    print(report.describe(found))
    if out is not None:
        report.write(found, out)


def moves() -> None:
    """Prints where the heads have gone."""
    from attn_cnn.convolution import moves as moves_lib
    from attn_cnn.training.runs import load_run

    print(moves_lib.describe(moves_lib.moves_of_run(load_run(FLAGS.workdir, cli.step()))))


def main(argv):
    check_flags(argv[1])
    {"express": express, "recover": recover, "moves": moves}[argv[1]]()


def command() -> None:
    """Runs this command from a terminal."""
    define_flags()
    cli.run(main, arguments=("express, recover or moves",), config=False)


if __name__ == "__main__":
    command()
