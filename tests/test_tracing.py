"""--profile writes a trace that TensorBoard and Perfetto open, and says where the time went."""

import gzip
import json
import re

import program
import pytest
from jax.profiler import ProfileData

from attn_cnn import train
from attn_cnn.training import tracing

PROGRAM = """
HloModule jit_step

%fused (a: f32[4,4], b: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4] parameter(0)
  ROOT %dot.1 = f32[4,4] dot(%a, %b), metadata={op_name="jit(step)/jvp(Net)/layer_0/mlp_in/dot_general"}
}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %fusion.1 = f32[4,4] fusion(%x, %x), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp(Net)/add"}
  %dot.2 = f32[4,4] dot(%x, %x), metadata={op_name="jit(step)/transpose(jvp(Net))/layer_1/attention/mixing/dot"}
  %add.1 = f32[4,4] add(%x, %x), metadata={op_name="jit(step)/jvp(Net)/layer_1/mlp_norm/add"}
  %dot.3 = f32[4,4] dot(%x, %x), metadata={op_name="jit(step)/optimizer/dot_general"}
  %gemm.1 = f32[4,4] custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %all-reduce.1 = f32[4,4] all-reduce(%x), metadata={op_name="jit(step)/psum"}
  %while.1 = f32[4,4] while(%x), condition=%c, body=%b, metadata={op_name="jit(step)/mixing/while"}
  ROOT %copy.1 = f32[4,4] copy(%x)
}
"""


def test_operations_are_told_apart_by_scope_and_by_what_they_compute():
    of = tracing.parts(PROGRAM)
    assert of["fusion.1"] == of["gemm.1"] == "other products of matrices"
    assert (of["dot.2"], of["add.1"], of["dot.3"]) == ("mixing of pixels", "normalisation", "optimizer")
    assert (of["all-reduce.1"], of["copy.1"]) == ("sums over devices", "all else")
    assert "while.1" not in of  # the operations in it count


def test_operations_that_run_at_once_share_the_time_and_gaps_are_waiting():
    first, second = ("host", 0), ("host", 1)
    executions = [
        tracing.Execution(first, "optimizer", 0, 4),
        tracing.Execution(first, "normalisation", 2, 6),
        tracing.Execution(first, "optimizer", 8, 10),
        tracing.Execution(second, "optimizer", 0, 10),
    ]
    times = tracing.time_by_part(executions)
    assert sum(times.values()) == pytest.approx(10)
    assert times["normalisation"] == pytest.approx(3 / 2)
    assert times["waiting"] == pytest.approx(2 / 2)
    assert times["optimizer"] == pytest.approx((5 + 10) / 2)


@pytest.mark.slow
def test_profile_traces_steps(tmp_path):
    done = program.run(f"--workdir={tmp_path / 'run'}", "--profile", "--config.epochs=1")
    assert "A trace of 10 steps is in" in done.stderr
    shares = dict(re.findall(r"^(\w[\w ]*?) +[\d.]+ +([\d.]+)%$", done.stderr, re.MULTILINE))
    assert {"optimizer", "mixing of pixels", "normalisation", "waiting", "other products of matrices"} <= set(shares)
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)
    (trace,) = (tmp_path / "run" / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("hlo_op" in event.get("args", {}) for event in events)
    assert list(trace.parent.glob("*.xplane.pb"))
    again = program.run(f"--workdir={tmp_path / 'run'}", "--profile", "--config.epochs=1")
    assert "No step is left to trace" in again.stderr


@pytest.mark.slow
def test_a_trace_holds_no_evaluation_and_ends_before_one(tmp_path, caplog):
    caplog.set_level("INFO", "attn_cnn")
    train.train(program.tiny_config(epochs=2, batch_size=200), tmp_path / "run", profile=True)
    assert "is finished: 14 steps" in caplog.text and "A trace of 5 steps is in" in caplog.text
    assert caplog.text.index("A trace of 5 steps") < caplog.text.index("epoch 1")
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.slow
def test_a_run_that_ends_before_the_traced_steps_ends_in_peace(tmp_path, caplog):
    caplog.set_level("INFO", "attn_cnn")
    train.train(program.tiny_config(epochs=1, batch_size=700), tmp_path / "run", profile=True)
    assert "is finished: 2 steps" in caplog.text and "A trace of 0 steps is in" in caplog.text


def test_a_trace_without_the_steps_operations_is_said_to_be_one():
    empty = ProfileData.from_serialized_xspace(b"")
    assert tracing.summary(empty, PROGRAM, 1) == "none of the step's operations is in the trace"
