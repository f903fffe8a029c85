"""Signals, rivals, full disks, damage and numbers that are not: a run loses nothing by them, and says what it met."""

import shutil
import signal
import subprocess
import sys
import time

import program
import pytest

from attn_cnn import train
from attn_cnn.errors import UserError
from attn_cnn.training.runs import load_config
from attn_cnn.training.stopping import Interrupt
from attn_cnn.training.workdir import open_workdir

LONG = ("--config.epochs=2000", "--config.checkpoint.every_epochs=1")
THREE_EPOCHS = ("--config.epochs=3", "--config.checkpoint.every_epochs=1")


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory):
    """The workdir of a run of three epochs that nothing disturbs, with the checkpoint of each."""
    workdir = tmp_path_factory.mktemp("peaceful") / "run"
    program.run(f"--workdir={workdir}", *THREE_EPOCHS)
    return workdir


@pytest.fixture
def finished(peaceful, tmp_path):
    """A copy of it, to do harm to."""
    return shutil.copytree(peaceful, tmp_path / "run")


@pytest.fixture
def resume(caplog):
    """Starts the run in a workdir again, in this process, and returns the log of that start."""
    caplog.set_level("INFO", "attn_cnn")

    def resume(workdir):
        caplog.clear()
        train.train(load_config(open_workdir(workdir)), workdir)
        return caplog.text

    return resume


@pytest.fixture
def hangup_is_heard():
    """Under nohup SIGHUP is ignored, here and in what is started from here."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.mark.slow
def test_a_signal_saves_the_step_in_flight(tmp_path, hangup_is_heard):
    workdir = tmp_path / "run"
    process = program.start(f"--workdir={workdir}", *LONG)
    program.wait_for(process, "epoch 2/")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(number)
        started = time.monotonic()
        output = process.communicate(timeout=30)[1]
        assert time.monotonic() - started < 30
        assert process.returncode == 128 + number
        step = int(output.split("stopped at step ")[1].split(";")[0])
        assert program.newest_checkpoint(workdir) == step
        process = program.start(f"--workdir={workdir}", *LONG)
        program.wait_for(process, f"Resuming {workdir} at step {step} of")
        program.wait_for(process, "epoch")
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = program.start(f"--workdir={tmp_path}/run", *LONG)
    program.wait_for(process, "epoch 1/")
    process.send_signal(signal.SIGINT)
    program.wait_for(process, "saving, then stopping")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT


@pytest.mark.slow
def test_a_second_ctrl_c_in_a_notebook_raises_keyboard_interrupt_and_the_save_under_way_is_whole(tmp_path):
    cell = f"""
import logging, sys, time
sys.path[:0] = ["{program.ROOT}", "{program.ROOT}/tests"]
import program
from attn_cnn import train
from attn_cnn.training.checkpoint import Checkpoints
from configs import quadratic
wait = Checkpoints.wait
Checkpoints.wait = lambda self: (time.sleep(5), wait(self))  # so that the second press comes before the stop is done
logging.basicConfig()
logging.getLogger("attn_cnn").setLevel("INFO")
config = program.tiny_config(quadratic)
config.epochs = 2000
try:
    train.train(config, "{tmp_path}/run")
except KeyboardInterrupt:
    print("the kernel lives", file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", cell], env=program.environment(), stderr=subprocess.PIPE, text=True
    )
    program.wait_for(process, "epoch 1/")
    process.send_signal(signal.SIGINT)
    program.wait_for(process, "saving, then stopping")
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "the kernel lives" in output
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if "tmp" in path.name]


def test_a_signal_that_comes_twice_is_one(caplog):
    caplog.set_level("INFO", "attn_cnn")
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGUSR1 and caplog.text.count("saving, then stopping") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_that_are_ignored_stay_so():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.signal == 0
            signal.raise_signal(signal.SIGUSR1)
            assert interrupt.signal == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_dead_one_does_not_block(tmp_path):
    flags = (f"--workdir={tmp_path}/run", *LONG)
    process = program.start(*flags)
    program.wait_for(process, "epoch 1/")
    started = time.monotonic()
    rival = program.run(*flags, check=False)
    assert rival.returncode == 1 and "another process is at work" in rival.stderr
    assert time.monotonic() - started < 15
    process.kill()
    process.wait()
    process = program.start(*flags)
    program.wait_for(process, "Resuming")
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_checkpoint_stays(tmp_path, resume, caplog):
    flags = (
        f"--workdir={tmp_path}/run",
        "--config.epochs=20",
        "--config.checkpoint.every_epochs=1",
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=30.0",
        "--config.optimizer.weight_decay=1.0",  # with a learning rate above 2, parameters grow at every step
        "--config.optimizer.warmup=0.9",
    )
    first = program.run(*flags, check=False)
    assert first.returncode == 1
    assert "not finite at step" in first.stderr and "with learning rate" in first.stderr
    assert "Traceback" not in first.stderr
    step = program.newest_checkpoint(tmp_path / "run")
    assert f"The checkpoint of step {step} is untouched" in first.stderr
    with pytest.raises(UserError) as second:
        resume(tmp_path / "run")
    assert f"Resuming {tmp_path}/run at step {step} " in caplog.text
    assert str(second.value) == first.stderr.split("error:")[1].strip()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_one_interval(finished, resume):
    before = program.scalars(finished, "test/loss")
    for file in (finished / "checkpoints" / "42" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    log = resume(finished)
    assert "Damaged checkpoint" in log and "checkpoints/42" in log
    assert "at step 28 of 42" in log
    assert program.scalars(finished, "test/loss") == before


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_earlier_is_lost(finished, resume):
    shutil.rmtree(finished / "checkpoints" / "42")
    no_file_beyond_4_kib = ("bash", "-c", 'trap "" XFSZ; ulimit -f 4; exec "$@"', "bash")
    process = subprocess.Popen(
        [*no_file_beyond_4_kib, *program.command(f"--workdir={finished}", *THREE_EPOCHS)],
        cwd=program.ROOT,
        env=program.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "cannot be written" in output and "Traceback" not in output
    assert f"Resuming {finished} at step 28 of" in resume(finished)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_signal_during_evaluation_costs_neither_the_evaluation_nor_its_metrics(epoch, peaceful, finished, resume):
    # What a stop in an epoch's evaluation leaves: its last step's checkpoint, without metrics.
    checkpoints = finished / "checkpoints"
    for step in range(epoch + 1, 4):
        shutil.rmtree(checkpoints / str(14 * step))
    shutil.rmtree(checkpoints / str(14 * epoch) / "metrics")
    log = resume(finished)
    assert f"Resuming {finished} at step {14 * epoch} of 42" in log and f"epoch {epoch}/3" in log
    for tag in ("train/loss", "test/loss", "test/accuracy"):
        assert program.scalars(finished, tag) == program.scalars(peaceful, tag)
    log = resume(finished)
    assert "finished" in log and "Resuming" not in log


@pytest.mark.slow
def test_a_damaged_metrics_item_costs_an_evaluation(finished, resume):
    before = resume(finished)
    (finished / "checkpoints" / "42" / "metrics" / "metrics").write_bytes(b"")
    log = resume(finished)
    assert "metrics is damaged" in log
    assert log.split("finished")[1] == before.split("finished")[1]


@pytest.mark.slow
def test_a_byte_flipped_in_the_metrics_does_not_stop_the_run(finished, resume):
    shutil.rmtree(finished / "checkpoints" / "42")
    (events,) = (finished / "metrics").iterdir()
    content = bytearray(events.read_bytes())
    content[len(content) // 2] ^= 0xFF
    events.write_bytes(bytes(content))
    log = resume(finished)
    assert "damaged or cut at byte" in log and "finished" in log
