"""One command trains every experiment and every seed, goes on where it was stopped, and writes what came out."""

import json
import shutil

import numpy as np
import pytest
from etils import epath
from program import run, run_module

from attn_cnn.errors import UserError
from benchmarks import results
from benchmarks.reproduce import Variant, is_recorded, train, variants_of, write
from benchmarks.results import Result
from configs import quadratic

pytestmark = pytest.mark.slow
TINY = ("--sweep=epochs=1", "--sweep=model.layers=1", "--sweep=model.hidden_size=16", "--sweep=model.mlp_size=16")


def reproduce(folder, *arguments):
    given = ("--scale=digits", f"--runs={folder}/runs", *arguments)
    return run_module("benchmarks.reproduce", *given, timeout=300)


def test_a_sweep_over_seeds_is_one_table_and_is_not_trained_twice(tmp_path):
    page = tmp_path / "results.md"
    page.write_text("Before.\n<!-- results -->\nold\n<!-- /results -->\nAfter.\n")
    command = ("--experiments=quadratic", "--seeds=0,1", *TINY, f"--out={page}")

    first = reproduce(tmp_path, *command)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("...") == 2  # one line as each begins
    rows = [line for line in page.read_text().splitlines() if line.startswith("| quadratic ")]
    assert len(rows) == 1 and rows[0].count("±") == 1
    assert page.read_text().startswith("Before.\n") and page.read_text().endswith("After.\n")
    assert "old" not in page.read_text() and (tmp_path / "results.png").stat().st_size > 1000

    again = reproduce(tmp_path, *command)
    assert again.returncode == 0 and "..." not in again.stdout
    assert again.stdout == "".join(first.stdout.splitlines(keepends=True)[2:])

    shutil.rmtree(tmp_path / "runs")
    from_record = reproduce(tmp_path, *command)
    assert from_record.returncode == 0 and from_record.stdout == again.stdout
    assert not (tmp_path / "runs").exists()


RECORDED = Result(
    config=json.loads(quadratic.get_config("digits").to_json()) | {"seed": 3},
    epochs=60,
    accuracy=[[59.0, 60.0], [0.5, 0.75]],
    loss=[[59.0, 60.0], [0.2, 0.1]],
    split="test",
    minutes=1.5,
    parameters=123,
    flops=456,
)


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = epath.Path(tmp_path / "results.json")
    assert results.read_record(path) == {}
    results.write_record(path, {"quadratic_digits_seed3": RECORDED})
    assert results.read_record(path) == {"quadratic_digits_seed3": RECORDED}


def test_what_is_no_record_is_said(tmp_path):
    path = epath.Path(tmp_path / "results.json")
    path.write_text("[1]")
    with pytest.raises(UserError, match="is no record of results"):
        results.read_record(path)


def test_a_recorded_run_counts_while_its_recipe_is_todays(capsys):
    of_digits = Variant("quadratic", "digits")
    assert is_recorded(of_digits, 3, {"quadratic_digits_seed3": RECORDED})
    assert not is_recorded(of_digits, 2, {"quadratic_digits_seed3": RECORDED})
    assert capsys.readouterr().out == ""

    other = RECORDED._replace(config=RECORDED.config | {"label_smoothing": 0.25})
    assert not is_recorded(of_digits, 3, {"quadratic_digits_seed3": other})
    assert "label_smoothing: 0.25 then, 0.0 now" in capsys.readouterr().out
    swept = Variant("quadratic", "digits", (("label_smoothing", "0.25"),))
    assert is_recorded(swept, 3, {swept.run_name(3): other})


def test_the_loss_of_an_epoch_is_the_mean_of_its_points():
    loss = results.mean_of_epochs(np.array([[0.5, 1.0, 1.5, 2.0, 2.25], [4.0, 2.0, 1.0, 3.0, 5.0]]))
    np.testing.assert_array_equal(loss, [[1, 2, 3], [3, 2, 5]])


def test_a_record_holds_no_folder_of_the_machine(tmp_path):
    first, second = epath.Path(tmp_path / "first"), epath.Path(tmp_path / "second")
    run("--config.epochs=1", f"--workdir={first}")
    run("--config.epochs=1", f"--workdir={second}", f"--config.init_from={first}")
    path = epath.Path(tmp_path / "results.json")
    results.write_record(path, {"second": results.read(second)})
    assert str(tmp_path) not in path.read_text()
    assert json.loads(path.read_text())["second"]["config"]["init_from"] == "first"


def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path):
    done = reproduce(tmp_path, "--experiments=quadratic", *TINY, "--sweep=optimizer.learning_rate=-1,0.003")
    assert done.returncode == 1
    assert "learning_rate=-1_seed0: " in done.stderr and "config.optimizer.learning_rate" in done.stderr
    assert "learning_rate=0.003 |" in done.stdout and "not run" in done.stdout


def test_a_pruned_run_starts_from_the_run_of_the_same_seed():
    command = Variant("quadratic_pruned", "small").command(epath.Path("runs"), 2)
    assert "--config.init_from=runs/quadratic_generalized_small_seed2" in command
    assert "--config.seed=2" in command


def test_no_run_starts_from_one_that_is_not_finished(tmp_path):
    said = train(Variant("quadratic_pruned", "digits"), epath.Path(tmp_path), 0)
    start = "quadratic_generalized_digits_seed0"
    assert said == f"quadratic_pruned_digits_seed0: {start}, from which it starts, is not finished"
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_recipe_is_not_taken_for_todays(tmp_path):
    run("--config.epochs=1", f"--workdir={tmp_path}/runs/quadratic_digits_seed0")
    done = reproduce(tmp_path, "--experiments=quadratic", f"--out={tmp_path}/results.md")
    assert done.returncode == 1 and "quadratic_digits_seed0: there is a run by another config" in done.stderr
    assert "model.layers: 1 then, 3 now" in done.stderr and "Warning" not in done.stderr
    assert "not run" in done.stdout and (tmp_path / "results.json").read_text().split() == ["{", "}"]


def test_the_papers_scale_is_the_config_as_it_is():
    assert "--config=configs/learned.py" in Variant("learned", "paper").command(epath.Path("runs"), 0)


def test_a_sweep_tries_every_choice():
    variants = variants_of(["learned"], "small", ["seed=0,1", "model.hidden_size=(16,32)"])
    assert [each.fields[0] for each in variants] == [("seed", "0"), ("seed", "1")]
    assert {each.fields[1] for each in variants} == {("model.hidden_size", "(16,32)")}


def test_what_has_not_begun_has_no_result(tmp_path):
    assert results.read(epath.Path(tmp_path)) is None


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = epath.Path(tmp_path / "page.md")
    page.write_text("mine")
    with pytest.raises(Exception, match="between which"):
        write(page, "results")
    assert page.read_text() == "mine"


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--experiments=quadratc", "--experiments names quadratc"),
        ("--sweep=optimizer.momentum", "--sweep=optimizer.momentum is not understood"),
        ("--seeds=x", "--seeds names 'x'"),
        ("--seeds=", "--seeds names ''"),
        ("--out=README.md", "between which results"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, argument, said):
    done = reproduce(tmp_path, argument)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
