"""Whatever the environment says of devices and clusters ends in a run, or in one message."""

import glob
import logging
import socket
import subprocess
import sys

import jax
import program
import pytest

from attn_cnn.errors import UserError
from attn_cnn.training import cluster


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu", "banana"])
def test_a_platform_that_is_not_there_is_one_message(platform, tmp_path):
    done = program.run(f"--workdir={tmp_path}/run", check=False, JAX_PLATFORMS=platform)
    assert done.returncode == 1 and f"JAX_PLATFORMS is {platform!r}" in done.stderr and "pip install" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=["slurm job", "slurm without its step", "kubernetes without its package"],
)
def test_a_cluster_half_detected_is_one_process(variables):
    script = "import logging; logging.basicConfig(level='INFO'); from attn_cnn.training import cluster; "
    script += "cluster.initialize(None, None, None); cluster.log_devices()"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=program.ROOT, env=program.environment(**variables), capture_output=True, text=True, check=True
    )
    assert "On 1 CPU device (cpu), 1 process." in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_hosts_that_do_not_meet_in_time_end_with_one_message(host):
    script = f"from attn_cnn.training import cluster; cluster.JOIN_SECONDS = 3; cluster.initialize({{!r}}, 2, {host})"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-c", script.format(address)],
        cwd=program.ROOT,
        env=program.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"not all of them met at {address} in 3 s" in done.stderr and "--num_processes=1" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_cluster_that_fails_is_one_message_with_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise KeyError("SLURM_LOCALID")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="do not find each other: 'SLURM_LOCALID'.*--num_processes=1"):
        cluster.initialize(None, None, None)
    cluster.initialize(None, 1, None)


@pytest.mark.parametrize(
    "given, message",
    [
        ((None, 2, None), "need all of --coordinator_address"),
        (("127.0.0.1:1", 2, 2), "--process_id is 2; of 2 processes it must be from 0 to 1"),
        (("127.0.0.1:1", 1, 0), "needs neither"),
    ],
)
def test_flags_that_contradict_each_other_are_named(given, message):
    with pytest.raises(UserError, match=message):
        cluster.initialize(*given)


def test_a_slurm_task_that_has_a_node_to_itself_uses_all_its_gpus():
    task = {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert cluster.slurm_devices(task) == [0, 1, 2, 3]
    assert cluster.slurm_devices(task | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) is None
    assert cluster.slurm_devices(task | {"CUDA_VISIBLE_DEVICES": "0"}) is None
    assert cluster.slurm_devices({}) is None


def test_an_accelerator_that_jax_does_not_use_is_a_warning_with_the_line_that_mends_it(monkeypatch, caplog):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] if "nvidia" in pattern else [])
    with caplog.at_level(logging.INFO, "attn_cnn"):
        cluster.log_devices()
    first, warning = caplog.messages
    assert first.startswith("On 1 CPU device (cpu), 1 process")
    assert "an NVIDIA GPU" in warning and 'pip install -U "jax[cuda13]"' in warning


def test_cpu_that_was_asked_for_is_no_warning(monkeypatch, caplog):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(glob, "glob", lambda pattern: [pattern])
    with caplog.at_level(logging.INFO, "attn_cnn"):
        cluster.log_devices()
    assert len(caplog.messages) == 1
