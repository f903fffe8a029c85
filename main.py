"""Trains, evaluates or describes a model, or tries it: python main.py --config=configs/quadratic.py:digits"""

from absl import flags

from attn_cnn import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/<config name>[_<scale>].")
flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where JAX finds no cluster by itself.")
flags.DEFINE_integer("num_processes", None, "How many processes take part, where JAX does not know; 1: this one alone.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_boolean("profile", False, "Write a trace of a few training steps to <workdir>/profile.")
flags.DEFINE_enum("mode", "train", ["train", "evaluate", "describe", "predict"], "What to do.")
flags.DEFINE_list("images", [], "Pictures for --mode=predict, or patterns as in pictures/*.png.")
cli.define_step()

GOES_WITH = {
    "profile": ("--mode=train",),
    "images": ("--mode=predict",),
    "step": ("--mode=evaluate", "--mode=predict"),
}


def main(_):
    cli.check_goes_with(f"--mode={FLAGS.mode}", GOES_WITH)
    from attn_cnn import predict, report, train  # not needed to find a mistake in the flags
    from attn_cnn.training import cluster, experiment, runs
    from attn_cnn.training.workdir import open_workdir

    cluster.initialize(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    workdir = cli.default_workdir() if FLAGS.workdir is None else FLAGS.workdir
    if FLAGS.mode == "train":
        train.train(FLAGS.config, workdir, FLAGS.profile)
    elif FLAGS.mode == "evaluate":
        train.evaluate(FLAGS.config, workdir, cli.step())
    elif FLAGS.mode == "predict":
        train.check_same_run(experiment.checked(FLAGS.config), open_workdir(workdir), only=("model.",))
        files = predict.find_pictures(FLAGS.images)
        print(predict.describe(runs.load_run(workdir, cli.step()), files))
    else:
        print(report.describe(runs.model_as_left(FLAGS.config, workdir)))


if __name__ == "__main__":
    cli.run(main)
