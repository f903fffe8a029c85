"""What each head of a run does, and a run without some of its heads.

    python -m attn_cnn.heads report --workdir=RUN
    python -m attn_cnn.heads report --maps=FILE.npz
    python -m attn_cnn.heads prune --workdir=RUN --out=NEW --heads=2:0,2:5

`report` prints a table, or with --json the same as JSON, and names the degenerate heads; of a file of
attention maps (`attn_cnn/maps.py`) it prints what they alone tell. `prune` makes NEW the run in RUN without the
heads named as layer:head, numbered as `report` does; NEW evaluates and goes on by RUN's command with --workdir=NEW.
Both take the newest checkpoint of RUN, or that of --step.
"""

import re

from absl import flags

from attn_cnn import cli, maps, paths
from attn_cnn.errors import UserError
from attn_cnn.heads import ablation
from attn_cnn.heads import report as report_lib
from attn_cnn.training.runs import load_run

FLAGS = flags.FLAGS
COMMANDS = ("report", "prune")
GOES_WITH = {"json": ("report",), "maps": ("report",), "out": ("prune",), "heads": ("prune",)}


def define_flags() -> None:
    """Defines the flags of both commands."""
    flags.DEFINE_string("workdir", None, "The run's workdir.")
    flags.DEFINE_string("maps", None, "A file of attention maps to report in the place of a run.")
    flags.DEFINE_bool("json", False, "Print the report as JSON.")
    flags.DEFINE_string("out", None, "The workdir that prune makes.")
    flags.DEFINE_list("heads", [], "What prune removes: layer:head, as in 2:0,2:5.")
    cli.define_step()


def check_flags(command: str) -> None:
    """Raises UserError if a flag is missing or is one that the command ignores."""
    cli.check_command(command, COMMANDS, GOES_WITH)
    if command == "report":
        cli.check_source(command, of_runs=("step",))
    elif not FLAGS.workdir:
        raise UserError(f"{command} needs --workdir=RUN.")
    if FLAGS.out is None and command == "prune":
        raise UserError("prune needs a workdir to make, as in --out=runs/pruned.")


def parse_heads(words: list[str]) -> dict[int, set[int]]:
    """Returns the heads of layers that words as 2:5 name.

    Raises:
      UserError: a word names none, or there are no words.
    """
    chosen: dict[int, set[int]] = {}
    for word in words:
        if not (found := re.fullmatch(r"(\d+):(\d+)", word.strip())):
            raise UserError(f"--heads has {word!r}, which is no layer:head, as in --heads=2:0,2:5.")
        chosen.setdefault(int(found[1]), set()).add(int(found[2]))
    if not chosen:
        raise UserError("prune needs the heads to remove, as in --heads=2:0,2:5.")
    return chosen


def report() -> None:
    """Prints the report of a run, or of a file of maps."""
    if FLAGS.maps is not None:
        rows = report_lib.of_maps(maps.read(paths.resolve(FLAGS.maps, "--maps")))
    else:
        rows = report_lib.of_run(load_run(FLAGS.workdir, cli.step()))
    print(report_lib.as_json(rows) if FLAGS.json else report_lib.describe(rows))


def prune() -> None:
    """Makes the run without heads, and says so."""
    chosen = parse_heads(FLAGS.heads)
    step = ablation.prune(FLAGS.workdir, FLAGS.out, chosen, cli.step())
    print(f"{FLAGS.out} now holds step {step} of {FLAGS.workdir} without {sum(map(len, chosen.values()))} heads.")


def main(argv):
    check_flags(argv[1])
    {"report": report, "prune": prune}[argv[1]]()


def command() -> None:
    """Runs this command from a terminal."""
    define_flags()
    cli.run(main, arguments=("report or prune",), config=False)


if __name__ == "__main__":
    command()
