"""--profile writes a trace that TensorBoard and Perfetto open."""

import gzip
import json

import program
import pytest

from attn_cnn import train


@pytest.mark.slow
def test_profile_traces_steps(tmp_path):
    done = program.run(f"--workdir={tmp_path / 'run'}", "--profile", "--config.epochs=1")
    assert "A trace of 10 steps is in" in done.stderr
    (trace,) = (tmp_path / "run" / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("hlo_op" in event.get("args", {}) for event in events)
    assert list(trace.parent.glob("*.xplane.pb"))
    again = program.run(f"--workdir={tmp_path / 'run'}", "--profile", "--config.epochs=1")
    assert "No step is left to trace" in again.stderr


@pytest.mark.slow
def test_a_run_shorter_than_the_trace_is_traced_to_its_end(tmp_path, caplog):
    caplog.set_level("INFO", "attn_cnn")
    train.train(program.tiny_config(epochs=1, batch_size=200), tmp_path / "run", profile=True)
    assert "is finished: 7 steps" in caplog.text and "A trace of 5 steps is in" in caplog.text
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
