"""One command trains every experiment and every seed, goes on where it was stopped, and writes what came out."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from etils import epath
from program import ROOT, environment, fill_disk, newest_checkpoint, run, run_module

from attn_cnn.errors import UserError
from benchmarks import reproduce as reproducing
from benchmarks import results
from benchmarks.experiments import EXPERIMENTS, Run, Variant
from benchmarks.reproduce import gather, publish, train, variants_of, write
from benchmarks.results import Result
from configs import quadratic, quadratic_generalized, quadratic_pruned

TINY = ("--sweep=epochs=1", "--sweep=model.layers=1", "--sweep=model.hidden_size=16", "--sweep=model.mlp_size=16")


def reproduce(folder, *arguments):
    given = ("--scale=digits", f"--runs={folder}/runs", *arguments)
    return run_module("benchmarks.reproduce", *given, timeout=300)


@pytest.mark.slow
def test_a_sweep_over_seeds_is_one_table_and_is_not_trained_twice(tmp_path):
    page, record = tmp_path / "results.md", tmp_path / "results.json"
    page.write_text("Before.\n<!-- results -->\nold\n<!-- /results -->\nAfter.\n")
    command = ("--experiments=quadratic", "--seeds=0,1", *TINY, f"--out={page}")

    first = reproduce(tmp_path, *command)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("...") == 2  # one line as each begins
    written, table = page.read_text(), "".join(first.stdout.splitlines(keepends=True)[2:])
    rows = [line for line in written.splitlines() if line.startswith("| quadratic ")]
    assert len(rows) == 1 and rows[0].count("±") == 1
    assert written.startswith("Before.\n") and written.endswith("After.\n")
    assert "old" not in written and (tmp_path / "results.png").stat().st_size > 1000

    record.unlink()
    again = reproduce(tmp_path, *command)
    assert again.returncode == 0 and again.stdout == table and page.read_text() == written

    shutil.rmtree(tmp_path / "runs")
    page.write_text("<!-- results --><!-- /results -->")
    from_record = reproduce(tmp_path, "--experiments=quadratic", "--seeds=1", *TINY, f"--out={page}")
    assert from_record.returncode == 0 and from_record.stdout == table and table in page.read_text()
    assert not (tmp_path / "runs").exists()


def recorded(experiment=quadratic, seed=3, **changes):
    """A result of an experiment of the digits that was finished."""
    fields = {
        "config": json.loads(experiment.get_config("digits").to_json()) | {"seed": seed},
        "start": None,
        "epochs": 60,
        "accuracy": [[59.0, 60.0], [0.8, 0.75]],  # the last is not the best
        "loss": [[59.0, 60.0], [0.2, 0.1]],
        "split": "test",
        "device_minutes": 1.5,
        "parameters": 123,
        "flops": 456,
    }
    return Result(**(fields | changes))


OF_DIGITS = Variant("quadratic", "digits")


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = epath.Path(tmp_path / "results.json")
    assert results.read_record(path) == {}
    swept = Variant("quadratic", "digits", (("epochs", "60"),))
    written = {Run(OF_DIGITS, 3): recorded(), Run(swept, 3): recorded(start={"seed": 1})}
    results.write_record(path, written)
    assert results.read_record(path) == written


@pytest.mark.parametrize("text", ["[1]", '[{"run": 1}]', "{", '[{"config": {}}]'])
def test_what_is_no_record_is_said(tmp_path, text):
    path = epath.Path(tmp_path / "results.json")
    path.write_text(text)
    with pytest.raises(UserError, match="is no record of results"):
        results.read_record(path)


def test_a_result_counts_while_its_recipe_is_todays():
    assert results.changes(Run(OF_DIGITS, 3), recorded()) == []
    other = recorded(config=recorded().config | {"label_smoothing": 0.25})
    assert results.changes(Run(OF_DIGITS, 3), other) == ["label_smoothing: 0.25 then, 0.0 now"]
    swept = Variant("quadratic", "digits", (("label_smoothing", "0.25"),))
    assert results.changes(Run(swept, 3), other) == []
    assert results.changes(Run(OF_DIGITS, 3), recorded(config=recorded().config | {"init_from": "another"}))


def test_a_field_that_came_later_has_had_its_default():
    older = {name: value for name, value in recorded().config.items() if name != "condition_penalty"}
    assert results.changes(Run(OF_DIGITS, 3), recorded(config=older)) == []


def test_a_pruned_result_counts_while_the_recipe_of_its_start_is_todays():
    pruned = Run(Variant("quadratic_pruned", "digits"), 3)
    start = recorded(quadratic_generalized).config
    assert results.changes(pruned, recorded(quadratic_pruned, start=start)) == []
    assert results.changes(pruned, recorded(quadratic_pruned, start=start | {"epochs": 7}))
    assert results.changes(pruned, recorded(quadratic_pruned))


def test_a_result_by_another_recipe_is_not_shown():
    run_of, other = Run(OF_DIGITS, 3), recorded(config=recorded().config | {"label_smoothing": 0.25})
    assert gather([], epath.Path("nowhere"), {run_of: recorded()}) == {run_of: recorded()}
    assert gather([run_of], epath.Path("nowhere"), {run_of: other}) == {}


def test_a_page_shows_all_that_its_record_has_at_its_scale_in_the_order_of_the_experiments(tmp_path):
    page = epath.Path(tmp_path / "results.md")
    last = Run(Variant("quadratic_pruned", "digits"), 0)
    of_small = recorded(config=json.loads(quadratic.get_config("small").to_json()))
    entries = {Run(OF_DIGITS, 3): recorded(), Run(OF_DIGITS, 1): recorded(seed=1)}
    entries[Run(Variant("quadratic", "small"), 0)] = of_small
    results.write_record(page.with_suffix(".json"), entries)
    rows = publish([last], epath.Path(tmp_path / "runs"), page)
    assert list(rows) == [OF_DIGITS, last.variant]
    assert [each.config["seed"] for each in rows[OF_DIGITS]] == [1, 3] and rows[last.variant] == []
    assert results.read_record(page.with_suffix(".json")) == entries
    assert " 0.7500, 0.7500 |" in page.read_text() and "not run" in page.read_text()
    assert " test accuracy |" in page.read_text()


def test_page_and_record_are_written_after_each_run(tmp_path, monkeypatch):
    page, finished, seen = epath.Path(tmp_path / "results.md"), {}, []

    def trained(run, folder):
        seen.append(list(results.read_record(page.with_suffix(".json"))))
        finished[run.workdir(folder)] = recorded(seed=run.seed)
        return ""

    monkeypatch.setattr(reproducing, "train", trained)
    monkeypatch.setattr(results, "read", finished.get)
    first, second = Run(OF_DIGITS, 0), Run(OF_DIGITS, 1)
    assert reproducing.reproduce([first, second], epath.Path(tmp_path), page) == []
    assert seen == [[], [first]] and list(results.read_record(page.with_suffix(".json"))) == [first, second]
    assert " 0.7500, 0.7500 |" in page.read_text()


def test_a_result_of_another_recipe_is_named_and_trained_again(tmp_path, monkeypatch, capsys):
    page, run_of = epath.Path(tmp_path / "results.md"), Run(OF_DIGITS, 3)
    older = recorded(config=recorded().config | {"label_smoothing": 0.25})
    results.write_record(page.with_suffix(".json"), {run_of: older})
    monkeypatch.setattr(reproducing, "train", lambda run, folder: f"{run.name} was begun")
    assert reproducing.reproduce([run_of], epath.Path(tmp_path), page) == ["quadratic_digits_seed3 was begun"]
    assert "another config, and left out: quadratic_digits_seed3 (label_smoothing: 0.25" in capsys.readouterr().out
    assert "not run" in page.read_text()


def test_a_record_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "results.json")
    results.write_record(path, {Run(OF_DIGITS, 3): recorded()})

    fill_disk(monkeypatch, "the disk is full")
    with pytest.raises(UserError, match="results.json cannot be written: the disk is full"):
        results.write_record(path, {})
    assert results.read_record(path) == {Run(OF_DIGITS, 3): recorded()}
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_a_damaged_run_is_named_and_left_out(tmp_path):
    run_of, folder = Run(OF_DIGITS, 0), epath.Path(tmp_path)
    run_of.workdir(folder).mkdir()
    (run_of.workdir(folder) / "config.json").write_text("{")
    assert "quadratic_digits_seed0/config.json is not a config" in train(run_of, folder)
    assert gather([run_of], folder, {}) == {}


def test_a_pruned_run_begins_with_the_config_of_its_start_beside_it(tmp_path, monkeypatch):
    folder, pruned = epath.Path(tmp_path), Run(Variant("quadratic_pruned", "digits"), 0)
    start = pruned.start.workdir(folder)
    start.mkdir()
    (start / "config.json").write_text("the start's")
    monkeypatch.setattr(results, "read", {start: recorded(quadratic_generalized, seed=0)}.get)
    monkeypatch.setattr(reproducing, "run_to_its_end", lambda command, log: 0)
    assert train(pruned, folder) == ""
    assert results.start_file(pruned.workdir(folder)).read_text() == "the start's"


@pytest.mark.slow
def test_a_pruned_result_keeps_the_config_of_its_start(tmp_path):
    start, pruned = epath.Path(tmp_path / "start"), epath.Path(tmp_path / "pruned")
    run("--config.epochs=1", f"--workdir={start}")
    run("--config.epochs=1", f"--workdir={pruned}", f"--config.init_from={start}")
    assert results.read(pruned).start is None
    results.start_file(pruned).write_text((start / "config.json").read_text())
    assert results.read(pruned).start == results.read(start).config
    assert results.read(pruned).config["init_from"] == "start"


def test_a_record_has_no_folder_of_the_machine():
    config = quadratic_pruned.get_config("digits")
    config.init_from, config.data.dir = "/home/me/runs/start", "/home/me/data"
    plain = results.without_folders(config)
    assert "/home" not in json.dumps(plain) and plain["init_from"] == "start"


def test_the_committed_page_is_what_its_record_says_by_todays_configs(tmp_path):
    page = epath.Path(shutil.copy(ROOT / "docs" / "results.md", tmp_path))
    record = results.read_record(epath.Path(shutil.copy(ROOT / "docs" / "results.json", tmp_path)))
    assert {run.name: lines for run, found in record.items() if (lines := reproducing.outdated(run, found))} == {}
    publish([Run(Variant(name, "small"), 0) for name in EXPERIMENTS], epath.Path(tmp_path / "runs"), page)
    assert page.read_text() == (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_readme_and_config_say_what_the_record_has(name):
    recorded = results.read_record(epath.Path(ROOT / "docs" / "results.json")).get(Run(Variant(name, "small"), 0))
    ours = f"{recorded.last_accuracy:.3f}" if recorded else ""
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}.py` |")]
    assert row.split("|")[-2].strip() == ours
    docstring = importlib.import_module(f"configs.{name}").__doc__
    assert re.findall(r":small .*: (0\.\d+)$", docstring, re.M) == ([ours] if ours else [])


def test_an_unfinished_run_is_shown_and_not_recorded(tmp_path, monkeypatch):
    page = epath.Path(tmp_path / "results.md")
    monkeypatch.setattr(results, "read", lambda workdir: recorded(epochs=59))
    publish([Run(OF_DIGITS, 3)], epath.Path(tmp_path), page)
    assert "0.7500 (epoch 59 of 60)" in page.read_text()
    assert results.read_record(page.with_suffix(".json")) == {}


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path):
    done = reproduce(tmp_path, "--experiments=quadratic", *TINY, "--sweep=optimizer.learning_rate=-1,0.003")
    assert done.returncode == 1
    assert "learning_rate=-1_seed0: " in done.stderr and "config.optimizer.learning_rate" in done.stderr
    assert "learning_rate=0.003 |" in done.stdout and "not run" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_its_run_and_the_same_command_resumes_it(tmp_path, number):
    sweep = ["epochs=30", *(each.removeprefix("--sweep=") for each in TINY[1:])]
    (variant,) = variants_of(["quadratic"], "digits", sweep)
    workdir = Run(variant, 0).workdir(epath.Path(tmp_path))
    arguments = ("--scale=digits", "--experiments=quadratic", f"--runs={tmp_path}", *(f"--sweep={e}" for e in sweep))
    command = [sys.executable, "-m", "benchmarks.reproduce", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not newest_checkpoint(workdir):
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, number)  # as a terminal does
    assert "stopped; the same command goes on" in process.stderr.read() and process.wait() == 128 + number
    stopped_at, log = newest_checkpoint(workdir), workdir.with_name(f"{workdir.name}.log")
    assert log.read_text().endswith(f"stopped at step {stopped_at}; the same command goes on from there.\n")
    assert not results.read(workdir).finished
    again = run_module("benchmarks.reproduce", *arguments)
    assert again.returncode == 0 and results.read(workdir).finished
    assert f"Resuming {workdir} at step {stopped_at}" in log.read_text()


@pytest.mark.slow
def test_a_run_of_another_recipe_is_not_taken_for_todays(tmp_path):
    run("--config.epochs=1", f"--workdir={tmp_path}/runs/quadratic_digits_seed0")
    done = reproduce(tmp_path, "--experiments=quadratic", f"--out={tmp_path}/results.md")
    assert done.returncode == 1 and "quadratic_digits_seed0, which has another config: move it away" in done.stderr
    assert "model.layers: 1 then, 3 now" in done.stderr and "Warning" not in done.stderr
    assert "not run" in done.stdout and json.loads((tmp_path / "results.json").read_text()) == []


def test_a_pruned_run_starts_from_the_run_of_the_same_seed():
    command = Run(Variant("quadratic_pruned", "small"), 2).command(epath.Path("runs"))
    assert "--config.init_from=runs/quadratic_generalized_small_seed2" in command
    assert "--config.seed=2" in command


@pytest.mark.slow
def test_no_run_starts_from_one_that_cannot_be_finished(tmp_path):
    run("--config.epochs=1", f"--workdir={tmp_path}/quadratic_generalized_digits_seed0")
    said = train(Run(Variant("quadratic_pruned", "digits"), 0), epath.Path(tmp_path))
    assert said.startswith("quadratic_pruned_digits_seed0 needs ") and "which has another config" in said
    assert [path.name for path in tmp_path.iterdir()] == ["quadratic_generalized_digits_seed0"]


def test_the_papers_scale_is_the_config_as_it_is():
    assert "--config=configs/learned.py" in Run(Variant("learned", "paper"), 0).command(epath.Path("runs"))
    assert "--config=configs/learned.py:small" in Run(Variant("learned", "small"), 0).command(epath.Path("runs"))


def test_a_sweep_tries_every_choice():
    variants = variants_of(["learned"], "small", ["seed=0,1", "model.hidden_size=(16,32)"])
    assert [each.fields[0] for each in variants] == [("seed", "0"), ("seed", "1")]
    assert {each.fields[1] for each in variants} == {("model.hidden_size", "(16,32)")}


def test_what_has_not_begun_has_no_result(tmp_path):
    assert results.read(epath.Path(tmp_path)) is None


@pytest.mark.parametrize("text", ["mine", "<!-- /results --><!-- results -->", "<!-- results --><!-- /results -->" * 2])
def test_a_page_without_marks_once_each_is_left_alone(tmp_path, text):
    page = epath.Path(tmp_path / "page.md")
    page.write_text(text)
    with pytest.raises(UserError, match="between which"):
        write(page, "results")
    assert page.read_text() == text


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("experiments", ["quadratc"], "--experiments names quadratc"),
        ("sweep", ["optimizer.momentum"], "--sweep=optimizer.momentum is not understood"),
        ("sweep", ["seed=0", "seed=1"], "--sweep names seed twice"),
        ("seeds", ["x"], "--seeds names 'x'"),
        ("seeds", [], "--seeds names ''"),
        ("seeds", ["0", "00"], "--seeds=0,00 names a seed twice"),
        ("out", "page.json", "is no page of Markdown"),
    ],
)
def test_what_is_wrong_is_said(flag, value, said):
    given = {"experiments": ["quadratic"], "sweep": [], "seeds": ["0"], "out": None}
    reproducing.check(types.SimpleNamespace(**given))
    with pytest.raises(UserError, match=re.escape(said)):
        reproducing.check(types.SimpleNamespace(**given | {flag: value}))


@pytest.mark.slow
def test_what_is_wrong_is_said_in_a_terminal(tmp_path):
    done = reproduce(tmp_path, "--experiments=quadratc")
    assert done.returncode == 1 and "--experiments names quadratc" in done.stderr and "Traceback" not in done.stderr
