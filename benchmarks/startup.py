"""From launch to the first training step of configs/quadratic.py:small, with warm caches.

python -m benchmarks.startup  # about a minute on 2 cores
"""

import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from attn_cnn import cli

ROUNDS = flags.DEFINE_integer("rounds", 5, "Starts that count; one before them fills the caches.")


def seconds_to_first_step() -> float:
    """Starts a run in a new workdir, ends it after its first step, and returns how long that took."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "main.py", "--config=configs/quadratic.py:small", f"--workdir={workdir}/run"]
        started = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None  # it is a pipe
        try:
            for line in process.stderr:
                if "step 1 is done" in line:
                    return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()
    raise RuntimeError("the run ended before its first step.")


def main(_):
    cold = seconds_to_first_step()
    warm = [seconds_to_first_step() for _ in range(ROUNDS.value)]
    print(f"first start {cold:.1f} s; later starts {statistics.median(warm):.1f} s ({min(warm):.1f}-{max(warm):.1f})")


if __name__ == "__main__":
    cli.run(main, config=False)
