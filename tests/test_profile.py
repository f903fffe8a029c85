"""--profile writes a trace that TensorBoard and Perfetto open."""

import gzip
import json

import program


def test_profile_traces_steps(tmp_path):
    done = program.run(f"--workdir={tmp_path / 'run'}", "--profile", "--config.epochs=1")
    assert "A trace of 10 steps is in" in done.stderr
    (trace,) = (tmp_path / "run" / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("hlo_op" in event.get("args", {}) for event in events)
    assert list(trace.parent.glob("*.xplane.pb"))
    again = program.run(f"--workdir={tmp_path / 'run'}", "--profile", "--config.epochs=1")
    assert "No step is left to trace" in again.stderr


def test_a_run_shorter_than_the_trace_is_traced_to_its_end(tmp_path):
    flags = ("--config.epochs=1", "--config.batch_size=200")
    done = program.run(f"--workdir={tmp_path / 'run'}", "--profile", *flags)
    assert "is finished: 7 steps" in done.stderr and "A trace of 5 steps is in" in done.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
