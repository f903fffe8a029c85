"""What happens to a run: signals, rivals, disks, numbers that are not. Nothing is lost and each says what it is."""

import resource
import shutil
import signal
import subprocess
import time

import program
import pytest

LONG = ("--config.epochs=2000", "--config.checkpoint.every_epochs=1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_in_flight(number, tmp_path):
    workdir = tmp_path / "run"
    process = program.start(f"--workdir={workdir}", *LONG)
    program.wait_for(process, "epoch 2/")
    process.send_signal(number)
    started = time.monotonic()
    output = process.communicate(timeout=30)[1]
    assert time.monotonic() - started < 30
    assert process.returncode == 128 + number
    step = int(output.split("stopped at step ")[1].split(";")[0])
    assert program.newest_checkpoint(workdir) == step
    process = program.start(f"--workdir={workdir}", *LONG)
    program.wait_for(process, f"Resuming {workdir} at step {step} of")
    process.kill()
    process.wait()


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = program.start(f"--workdir={tmp_path}/run", *LONG)
    program.wait_for(process, "epoch 1/")
    process.send_signal(signal.SIGINT)
    program.wait_for(process, "saving, then stopping")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT


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


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_checkpoint_stays(tmp_path):
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
    second = program.run(*flags, check=False)
    assert f"Resuming {tmp_path}/run at step {step} " in second.stderr
    assert second.stderr.split("error:")[1] == first.stderr.split("error:")[1]


def test_a_damaged_newest_checkpoint_costs_one_interval(tmp_path):
    flags = (f"--workdir={tmp_path}/run", "--config.epochs=3", "--config.checkpoint.every_epochs=1")
    program.run(*flags)
    before = program.scalars(tmp_path / "run", "test/loss")
    for file in (tmp_path / "run" / "checkpoints" / "42" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    done = program.run(*flags)
    assert "Damaged checkpoint" in done.stderr and "checkpoints/42" in done.stderr
    assert "at step 28 of 42" in done.stderr
    assert program.scalars(tmp_path / "run", "test/loss") == before


def test_a_full_disk_is_named_and_nothing_earlier_is_lost(tmp_path):
    flags = (f"--workdir={tmp_path}/run", *LONG)
    process = program.start(*flags)
    program.wait_for(process, "epoch 2/")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    step = program.newest_checkpoint(tmp_path / "run")

    def no_file_beyond_4_kib():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = subprocess.Popen(
        program.command(*flags),
        cwd=program.ROOT,
        env=program.environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=no_file_beyond_4_kib,
    )
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "cannot be written" in output and "Traceback" not in output
    process = program.start(*flags)
    program.wait_for(process, f"Resuming {tmp_path}/run at step {step} of")
    process.kill()
    process.wait()


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = program.run(f"--workdir={tmp_path}/file/run", check=False)
    assert done.returncode == 1 and f"the workdir {tmp_path}/file/run cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_signal_during_evaluation_costs_neither_the_evaluation_nor_its_metrics(epoch, tmp_path):
    flags = ("--config.epochs=3", "--config.checkpoint.every_epochs=1")
    peaceful, workdir = tmp_path / "peaceful", tmp_path / "run"
    program.run(f"--workdir={peaceful}", *flags)
    program.run(f"--workdir={workdir}", *flags)
    # What a stop in an epoch's evaluation leaves: its last step's checkpoint, without metrics.
    checkpoints = workdir / "checkpoints"
    for step in range(epoch + 1, 4):
        shutil.rmtree(checkpoints / str(14 * step))
    shutil.rmtree(checkpoints / str(14 * epoch) / "metrics")
    done = program.run(f"--workdir={workdir}", *flags)
    assert f"Resuming {workdir} at step {14 * epoch} of 42" in done.stderr and f"epoch {epoch}/3" in done.stderr
    for tag in ("train/loss", "test/loss", "test/accuracy"):
        assert program.scalars(workdir, tag) == program.scalars(peaceful, tag)
    done = program.run(f"--workdir={workdir}", *flags)
    assert "finished" in done.stderr and "Resuming" not in done.stderr


def test_a_damaged_metrics_item_costs_an_evaluation(tmp_path):
    flags = (f"--workdir={tmp_path}/run", "--config.epochs=1")
    before = program.run(*flags).stderr
    (tmp_path / "run" / "checkpoints" / "14" / "metrics" / "metrics").write_bytes(b"")
    done = program.run(*flags)
    assert "metrics is damaged" in done.stderr
    assert done.stderr.split("finished")[1] == before.split("finished")[1]


def test_a_byte_flipped_in_the_metrics_does_not_stop_the_run(tmp_path):
    flags = (f"--workdir={tmp_path}/run", "--config.epochs=2", "--config.checkpoint.every_epochs=1")
    program.run(*flags)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "28")
    (events,) = (tmp_path / "run" / "metrics").iterdir()
    content = bytearray(events.read_bytes())
    content[len(content) // 2] ^= 0xFF
    events.write_bytes(bytes(content))
    done = program.run(*flags)
    assert "damaged or cut at byte" in done.stderr and "finished" in done.stderr


@pytest.mark.parametrize("workdir", ["memory://run", "nothing://run"])
def test_a_workdir_that_cannot_hold_checkpoints_is_refused(workdir):
    done = program.run(f"--workdir={workdir}", check=False)
    assert done.returncode == 1 and f"the workdir {workdir} must be a local path, or one of gs://" in done.stderr
