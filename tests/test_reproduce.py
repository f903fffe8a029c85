"""One command trains every experiment and every seed, goes on where it was stopped, and writes what came out."""

import pytest
from etils import epath
from program import run_module

from benchmarks.reproduce import Variant, result, train, variants_of, write

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


def test_the_papers_scale_is_the_config_as_it_is():
    assert "--config=configs/learned.py" in Variant("learned", "paper").command(epath.Path("runs"), 0)


def test_a_sweep_tries_every_choice():
    variants = variants_of(["learned"], "small", ["seed=0,1", "model.hidden_size=(16,32)"])
    assert [each.fields[0] for each in variants] == [("seed", "0"), ("seed", "1")]
    assert {each.fields[1] for each in variants} == {("model.hidden_size", "(16,32)")}


def test_what_has_not_begun_has_no_result(tmp_path):
    assert result(epath.Path(tmp_path)) is None


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
    ],
)
def test_what_is_wrong_is_said(tmp_path, argument, said):
    done = reproduce(tmp_path, argument)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
