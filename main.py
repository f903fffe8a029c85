"""Trains, evaluates or describes a model: python main.py --config=configs/quadratic.py:digits"""

from absl import flags

from attn_cnn import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/<config name>[_<scale>].")
flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where JAX finds no cluster by itself.")
flags.DEFINE_integer(
    "num_processes", None, "How many processes take part, where JAX finds no cluster by itself; 1: just this."
)
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_boolean("profile", False, "Write a trace of a few training steps to <workdir>/profile.")
flags.DEFINE_enum("mode", "train", ["train", "evaluate", "describe"], "What to do.")


@flags.multi_flags_validator(["mode", "profile"], message="--profile traces training; it goes with --mode=train alone.")
def profile_goes_with_training(values):
    return values["mode"] == "train" or not values["profile"]


def main(_):
    from attn_cnn import report, train  # not needed to find a mistake in the flags
    from attn_cnn.training import cluster

    cluster.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    workdir = cli.default_workdir() if FLAGS.workdir is None else FLAGS.workdir
    if FLAGS.mode == "train":
        train.train(FLAGS.config, workdir, FLAGS.profile)
    elif FLAGS.mode == "evaluate":
        train.evaluate(FLAGS.config, workdir)
    else:
        print(report.describe(FLAGS.config.model))


if __name__ == "__main__":
    cli.run(main)
