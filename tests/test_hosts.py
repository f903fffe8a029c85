"""Several processes on 127.0.0.1, which stand for several hosts, train as one, and none is left hanging."""

import signal
import socket
import subprocess
import time

import numpy as np
import program
import pytest
from etils import epath

from attn_cnn import train
from attn_cnn.training.runs import load_config

FLAGS = (
    "--config.epochs=2",
    "--config.log_every_steps=1",
    "--config.checkpoint.every_epochs=1",
    "--config.model.dropout=0.0",
    "--config.model.attention_dropout=0.0",
)
LONG = ("--config.epochs=500", *FLAGS[1:])


def start_hosts(workdir, *flags, hosts=2, devices=2, flags_of_second=(), homes=()):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        program.start(
            f"--workdir={workdir}",
            *flags,
            *(flags_of_second if host == 1 else ()),
            f"--coordinator_address={address}",
            f"--num_processes={hosts}",
            f"--process_id={host}",
            devices=devices,
            variables={"HOME": str(homes[host])} if homes else None,
        )
        for host in range(hosts)
    ]


def finish(processes, timeout=300):
    """Exit statuses and what each process wrote, once all have ended."""
    outputs = []
    try:
        deadline = time.monotonic() + timeout
        for process in processes:
            outputs.append(process.communicate(timeout=deadline - time.monotonic())[1])
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def losses(workdir):
    return np.array(program.scalars(workdir, "train/loss"))


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two_hosts") / "run"
    statuses, outputs = finish(start_hosts(workdir, *FLAGS))
    assert statuses == [0, 0], outputs
    return workdir, outputs


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """The losses of one host, by its number of devices."""
    folder = tmp_path_factory.mktemp("one_host")
    for devices in (1, 4):
        program.run(f"--workdir={folder / str(devices)}", *FLAGS, devices=devices)
    return {devices: losses(folder / str(devices)) for devices in (1, 4)}


@pytest.mark.slow
def test_losses_are_the_same_on_one_and_on_four_devices(one_host):
    assert len(one_host[1]) == 28
    np.testing.assert_allclose(one_host[1][:20], one_host[4][:20], rtol=1e-5)


@pytest.mark.slow
def test_two_hosts_of_two_devices_train_as_one_of_four_and_one_of_one(two_hosts, one_host):
    workdir, _ = two_hosts
    for devices in (4, 1):
        assert len(one_host[devices]) == 28
        np.testing.assert_allclose(losses(workdir)[:20], one_host[devices][:20], rtol=1e-5)


@pytest.mark.slow
def test_one_host_speaks_and_writes_for_all(two_hosts):
    workdir, (first, second) = two_hosts
    assert "epoch 2/2" in first and "epoch" not in second
    assert len(list((workdir / "metrics").iterdir())) == 1
    assert len(losses(workdir)) == 28


@pytest.mark.slow
def test_evaluation_by_two_hosts_equals_that_by_one_exactly(two_hosts):
    workdir, _ = two_hosts
    statuses, (by_two, _) = finish(start_hosts(workdir, *FLAGS, "--mode=evaluate"))
    by_one = program.run(f"--workdir={workdir}", *FLAGS, "--mode=evaluate").stderr
    assert statuses == [0, 0] and by_one.split(": test")[1] in by_two
    # The log has four decimals; the event file, which two hosts' last evaluation went into, has all.
    config = load_config(epath.Path(workdir))
    again = train.evaluate(config, workdir)
    assert np.float32(again["loss"]) == np.float32(program.scalars(workdir, "test/loss")[-1][1])
    assert np.float32(again["accuracy"]) == np.float32(program.scalars(workdir, "test/accuracy")[-1][1])


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(2, 1), (1, 2)])
def test_a_checkpoint_of_some_hosts_is_resumed_by_others(first, second, two_hosts, tmp_path):
    reference, _ = two_hosts
    workdir = tmp_path / "run"

    def start(hosts):
        if hosts == 2:
            return start_hosts(workdir, *FLAGS)
        return [program.start(f"--workdir={workdir}", *FLAGS, devices=4)]

    processes = start(first)
    program.wait_for(processes[0], "Starting")
    for process in processes:
        process.send_signal(signal.SIGTERM)
    statuses, outputs = finish(processes)
    assert set(statuses) == {128 + signal.SIGTERM}, outputs
    statuses, outputs = finish(start(second))
    assert set(statuses) == {0} and "Resuming" in outputs[0], outputs
    np.testing.assert_allclose(losses(workdir), losses(reference), rtol=1e-4)


@pytest.mark.slow
def test_sigterm_to_one_host_stops_all_at_the_same_step(tmp_path):
    processes = start_hosts(tmp_path / "run", *LONG)
    program.wait_for(processes[0], "epoch 2/")
    processes[1].send_signal(signal.SIGTERM)
    statuses, outputs = finish(processes, timeout=60)
    assert "stopped at step" in outputs[0], outputs
    assert statuses == [128 + signal.SIGTERM] * 2
    step = int(outputs[0].split("stopped at step ")[1].split(";")[0])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_host_dies_the_others_end_and_a_restart_resumes(victim, tmp_path):
    processes = start_hosts(tmp_path / "run", *LONG)
    program.wait_for(processes[0], "epoch 3/")
    processes[victim].kill()
    other = processes[1 - victim]
    started = time.monotonic()
    try:
        output = other.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        pytest.fail("the other process hangs")
    finally:
        other.kill()
    assert time.monotonic() - started < 120 and other.returncode != 0
    assert "Traceback" not in output
    processes = start_hosts(tmp_path / "run", *LONG)
    program.wait_for(processes[0], "Resuming")
    program.wait_for(processes[0], "epoch")
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert set(finish(processes)[0]) == {128 + signal.SIGTERM}


@pytest.mark.slow
def test_hosts_with_different_configs_are_stopped(tmp_path):
    processes = start_hosts(tmp_path / "run", *FLAGS, flags_of_second=("--config.seed=1",))
    statuses, outputs = finish(processes)
    assert statuses == [1, 1] and all("different configs" in output for output in outputs), outputs


@pytest.mark.slow
def test_what_stops_the_first_host_stops_the_others(two_hosts):
    workdir, _ = two_hosts
    statuses, (first, second) = finish(start_hosts(workdir, *FLAGS, "--config.seed=7"), timeout=100)
    assert statuses == [1, 1]
    assert "seed: 0 then, 7 now" in first and "process 0 cannot go on" in second


@pytest.mark.slow
def test_hosts_that_do_not_share_the_workdir_are_stopped(tmp_path):
    elsewhere = (f"--workdir={tmp_path}/elsewhere",)
    statuses, outputs = finish(start_hosts(tmp_path / "run", *FLAGS, flags_of_second=elsewhere), timeout=60)
    assert statuses == [1, 1] and all("not all hosts see" in output for output in outputs), outputs


@pytest.mark.slow
def test_hosts_with_different_data_are_stopped(tmp_path):
    images, labels = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), np.uint8), np.arange(200) % 10
    homes = [tmp_path / "first", tmp_path / "second"]
    for home, order in zip(homes, (slice(None), slice(None, None, -1)), strict=True):
        home.mkdir()
        train_set = {"train_images": images[order], "train_labels": labels[order]}
        np.savez(home / "data.npz", **train_set, test_images=images, test_labels=labels)
    processes = start_hosts(tmp_path / "run", *FLAGS, "--config.data.name=npz:~/data.npz", homes=homes)
    statuses, outputs = finish(processes, timeout=100)
    assert statuses == [1, 1] and all("the hosts loaded different data" in output for output in outputs), outputs
