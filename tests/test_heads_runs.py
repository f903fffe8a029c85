"""A run prunes, resets or freezes the heads of another one at its start, and a head is removed by hand."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
from etils import epath
from golden import flat

from attn_cnn import maps, report, torch_export, torch_import, train
from attn_cnn.errors import UserError
from attn_cnn.explorer import view
from attn_cnn.heads import __main__ as heads_command
from attn_cnn.heads import ablation, history
from attn_cnn.heads import report as heads_report
from attn_cnn.maps import Maps
from attn_cnn.training import experiment as experiment_lib
from attn_cnn.training import runs
from attn_cnn.training import workdir as workdir_lib
from attn_cnn.training.experiment import create_experiment, random_state
from attn_cnn.training.runs import load_config, load_run
from attn_cnn.training.start import first_state
from configs import quadratic_generalized

LINE = jnp.array([[1.0, 0.0], [0.0, 1e-3]])
DEGENERATE = {0: {1, 4}, 1: {0, 1, 2, 3, 4}}  # what the other run has


def config_of(**changes):
    changes = {"model.layers": 2, "model.heads": 5, "epochs": 2, "checkpoint.every_epochs": 1, **changes}
    return program.tiny_config(quadratic_generalized, **changes)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The workdir of a finished run with degenerate heads: two in its first layer, all in its second."""
    experiment = create_experiment(config_of())
    params = random_state(experiment).params
    for layer, heads in DEGENERATE.items():
        attention = params[f"layer_{layer}"]["attention"]
        for head in heads:
            attention["spreads"] = attention["spreads"].at[head].set(LINE)
    workdir = epath.Path(tmp_path_factory.mktemp("other")) / "run"
    state = experiment_lib.state_of(experiment, {"params": params}, experiment.total_steps)
    workdir_lib.create(workdir, experiment.config, experiment.spec, state)
    return workdir


@pytest.fixture(scope="module")
def pruned(other, tmp_path_factory):
    """A run that starts from it, prunes and freezes the positions of what is left: config, workdir, last state."""
    config = config_of(init_from=str(other), degenerate_heads="prune", freeze="positions")
    workdir = epath.Path(tmp_path_factory.mktemp("pruned")) / "run"
    return config, workdir, train.train(config, workdir)


# Prune at the start


@pytest.mark.slow
def test_degenerate_heads_are_gone_and_named_and_all_else_is_as_it_was(other):
    start = first_state(create_experiment(config_of(init_from=str(other), degenerate_heads="prune")))
    assert start.surgery.kept == ((0, 2, 3), ())
    assert {layer: set(heads) for layer, heads in start.degenerate.items()} == DEGENERATE
    assert "condition number is 1e+06, above 1000" in start.degenerate[0][1]
    theirs = load_run(other).params
    attention = start.state.params["layer_0"]["attention"]
    for name in ("centers", "spreads"):
        np.testing.assert_array_equal(attention[name], theirs["layer_0"]["attention"][name][jnp.array([0, 2, 3])])
    assert list(flat(start.state.params["layer_1"]["attention"])) == ["value/bias"]
    program.assert_same_bits(start.state.params["classifier"], theirs["classifier"])


@pytest.mark.slow
def test_the_config_stays_as_given_and_the_heads_that_remain_stand_beside_it(pruned):
    _, workdir, state = pruned
    assert load_config(workdir).model.heads == 5
    assert json.loads((workdir / "heads.json").read_text()) == {"kept": [[0, 2, 3], []], "reset": [[], []]}
    run = load_run(workdir)
    assert run.config.model.heads == (3, 0)
    program.assert_same_bits(run.params, state.params)
    assert history.read(workdir)["entropy"].shape == (2, 2, 3)
    assert np.isnan(history.read(workdir)["entropy"][:, 1]).all()


@pytest.mark.slow
def test_the_same_command_resumes_and_needs_the_other_run_no_more(pruned, tmp_path):
    config, workdir, state = pruned
    workdir = epath.Path(shutil.copytree(workdir, tmp_path / "run"))
    numbers = history.read(workdir)
    shutil.rmtree(workdir / "checkpoints" / "28")
    program.assert_same_bits(train.train(config, workdir), state)
    program.assert_same_bits(history.read(workdir), numbers)


@pytest.mark.slow
def test_it_is_evaluated_described_reported_exported_and_imported(pruned, tmp_path):
    config, workdir, state = pruned
    assert train.evaluate(config, workdir)["loss"] == pytest.approx(
        program.scalars(workdir, "test/loss")[-1][1], rel=1e-5
    )
    described = report.describe(runs.model_as_left(config, workdir))
    assert "layer_0/attention/centers" in described and "layer_1/attention/centers" not in described
    run = load_run(workdir)
    assert [(row["layer"], row["head"]) for row in heads_report.of_run(run)] == [(0, 0), (0, 1), (0, 2)]
    torch_export.export_run(run, epath.Path(tmp_path) / "out.npz")
    state_dict, *_ = torch_import.read_checkpoint(epath.Path(tmp_path) / "out.npz")
    program.assert_same_bits(torch_import.import_state_dict(state_dict, run.config.model), state.params)
    with pytest.raises(UserError, match=r"its layers have 3,0 heads: set --config.model.heads=\"\(3,0,\)\""):
        torch_import.import_state_dict(state_dict, config.model)


@pytest.mark.slow
def test_a_run_that_starts_from_a_pruned_one_lacks_the_same_heads(pruned):
    _, workdir, state = pruned
    for heads in (5, (3, 0)):
        start = first_state(create_experiment(config_of(init_from=str(workdir), **{"model.heads": heads})))
        program.assert_same_bits(start.state.params, state.params)
    with pytest.raises(UserError, match="layer_0/attention/centers has shape"):
        first_state(create_experiment(config_of(init_from=str(workdir), **{"model.heads": 4})))


def test_a_damaged_list_of_heads_is_named(other, tmp_path):
    workdir = epath.Path(shutil.copytree(other, tmp_path / "run"))
    (workdir / "heads.json").write_text('{"kept": 5}')
    with pytest.raises(UserError, match="heads.json does not say which heads remain"):
        load_run(workdir)


# Freeze, reset


@pytest.mark.slow
def test_frozen_positions_are_bitwise_what_they_were_and_all_else_moves(pruned, other):
    before, after = (flat(params) for params in (load_run(other).params, pruned[2].params))
    for name in ("centers", "spreads"):
        kept = before[f"layer_0/attention/{name}"][jnp.array([0, 2, 3])]
        np.testing.assert_array_equal(after[f"layer_0/attention/{name}"], kept)
    assert np.all(
        after["layer_0/attention/value/kernel"] != before["layer_0/attention/value/kernel"][jnp.array([0, 2, 3])]
    )
    assert np.all(after["classifier/kernel"] != before["classifier/kernel"])


def test_a_frozen_run_is_evaluated_by_the_config_that_froze_it(tmp_path):
    config = config_of(freeze="positions")
    workdir_lib.write_config(config, epath.Path(tmp_path) / "config.json")
    config.freeze = "none"
    with pytest.raises(UserError, match="freeze: 'positions' then, 'none' now"):
        train.evaluate(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_without_another_run_freezing_holds_all_heads(optimizer, tmp_path):
    config = config_of(freeze="both", epochs=1, **{"optimizer.name": optimizer, "optimizer.weight_decay": 0.1})
    before = flat(random_state(create_experiment(config)).params)
    after = flat(train.train(config, tmp_path / "run").params)
    frozen = {f"layer_{n}/attention/{name}" for n in (0, 1) for name in ("centers", "spreads", "value/kernel")}
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == (name in frozen), name


@pytest.mark.slow
def test_reset_heads_are_drawn_anew_and_train_while_the_others_stay(other, tmp_path):
    config = config_of(init_from=str(other), degenerate_heads="reset", freeze="both", epochs=1, condition_penalty=0.1)
    state, workdir = train.train(config, tmp_path / "run"), epath.Path(tmp_path) / "run"
    assert json.loads((workdir / "heads.json").read_text())["reset"] == [[1, 4], [0, 1, 2, 3, 4]]
    start = first_state(create_experiment(config)).state.params
    theirs, fresh = load_run(other).params, random_state(create_experiment(config)).params
    for layer, chosen in DEGENERATE.items():
        for name in ("centers", "spreads", "value/kernel"):
            name = f"layer_{layer}/attention/{name}"
            for head in range(5):
                began = flat(fresh if head in chosen else theirs)[name][head]
                np.testing.assert_array_equal(flat(start)[name][head], began)
                assert np.array_equal(flat(state.params)[name][head], began) == (head not in chosen)
    np.testing.assert_array_equal(
        start["layer_0"]["attention"]["value"]["bias"], theirs["layer_0"]["attention"]["value"]["bias"]
    )
    shutil.rmtree(workdir / "checkpoints" / "14")
    program.assert_same_bits(train.train(config, workdir), state)


# By hand


command = functools.partial(program.run_module, "attn_cnn.heads", check=True)


def leaves_of(config, workdir):
    """Every array of the newest state in a workdir by its path, as in ".params['layer_0']['attention']['centers']"."""
    experiment = create_experiment(config, surgery=workdir_lib.read_surgery(epath.Path(workdir)))
    _, state = runs.restore(experiment, epath.Path(workdir))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_by_hand_the_optimizers_state_of_what_remains_stays_and_the_run_goes_on(optimizer, tmp_path):
    config, workdir, out = config_of(**{"optimizer.name": optimizer}), epath.Path(tmp_path) / "run", tmp_path / "new"
    train.train(config, workdir)
    shutil.rmtree(workdir / "checkpoints" / "28")
    chosen = {0: {1, 4}, 1: {0, 1, 2, 3, 4}}
    assert ablation.prune(workdir, out, chosen, "newest") == 14
    before, after = leaves_of(config, workdir), leaves_of(config, out)
    moments = [name for name in after if name.startswith(".opt_state") and "['layer_0']['attention']" in name]
    assert moments and all(np.any(after[name]) for name in moments)
    for name, value in after.items():
        of_heads = "['layer_0']['attention']" in name and not name.endswith("['bias']")
        np.testing.assert_array_equal(value, before[name][np.array([0, 2, 3])] if of_heads else before[name])
    assert int(train.train(config, out).step) == 28
    assert load_run(out).config.model.heads == (3, 0)
    with pytest.raises(UserError, match="holds a run already"):
        ablation.prune(workdir, out, {0: {0}}, "newest")


@pytest.mark.slow
def test_the_command_reports_a_table_or_json_and_prunes(other, tmp_path):
    table = command("report", f"--workdir={other}").stdout
    assert "center" in table and "attention is a line: condition number is 1e+06, above 1000" in table
    rows = json.loads(command("report", f"--workdir={other}", "--json").stdout)
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in (0, 1) for head in range(5)]
    assert {(row["layer"], row["head"]) for row in rows if row["degenerate"]} == {
        (layer, head) for layer, heads in DEGENERATE.items() for head in heads
    }
    np.testing.assert_allclose(rows[0]["center"], load_run(other).params["layer_0"]["attention"]["centers"][0])
    out = tmp_path / "new"
    done = command("prune", f"--workdir={other}", f"--out={out}", "--heads=0:1,1:0,1:2")
    assert done.stdout == f"{out} now holds step 28 of {other} without 3 heads.\n"
    assert load_run(out).config.model.heads == (4, 3)


@pytest.mark.slow
def test_the_command_reports_heads_of_a_file_of_attention_maps(tmp_path):
    same = np.broadcast_to(np.eye(6).reshape(2, 3, 2, 3), (2, 1, 4, 2, 3, 2, 3))  # every query looks at itself
    maps.write(epath.Path(tmp_path) / "maps.npz", Maps(list(same)))
    rows = json.loads(command("report", f"--maps={tmp_path / 'maps.npz'}", "--json").stdout)
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in (0, 1) for head in range(4)]
    assert all(row["nonlocality"] == 0 and row["mass_3x3"] == 1 for row in rows)
    assert "most" in command("report", f"--maps={tmp_path / 'maps.npz'}").stdout


@pytest.mark.parametrize(
    "words, message",
    [(["2"], "'2', which is no layer:head"), (["a:b"], "no layer:head"), ([], "prune needs the heads to remove")],
)
def test_heads_that_are_none_are_named(words, message):
    with pytest.raises(UserError, match=message):
        heads_command.parse_heads(words)


def test_heads_that_the_run_does_not_have_are_answered_with_those_that_there_are(other, tmp_path):
    with pytest.raises(UserError, match="--heads names 1:7, but the heads are 0:0 to 0:4, 1:0 to 1:4"):
        ablation.prune(other, tmp_path / "new", {1: {7}}, "newest")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("paint",), "'paint' is no command; the commands are report, prune"),
        (("report", "--heads=0:1"), "--heads goes with prune, not with report"),
        (("prune", "--heads=0:1"), "prune needs a workdir to make"),
        (("prune", "--json", "--heads=0:1"), "--json goes with report, not with prune"),
        (("report", "--maps=x"), "report is of --workdir or of --maps, and both are given"),
    ],
)
def test_what_the_command_does_not_understand_is_said(arguments, message):
    assert message in program.refusal(heads_command, *arguments, "--workdir=x")


@pytest.mark.slow
def test_a_mistake_ends_the_command_with_one_message():
    done = command("report", check=False)
    assert done.returncode == 1 and done.stderr == "error: report needs --workdir=RUN, or --maps=FILE in its place.\n"


# The trail of checkpoints


@pytest.mark.slow
def test_a_trail_of_checkpoints_stays_and_a_page_shows_what_of_it_can_be_read(tmp_path, caplog):
    config = config_of(**{"epochs": 5, "checkpoint.keep": 1, "checkpoint.history_epochs": 2, "model.layers": 1})
    train.train(config, tmp_path / "run")
    kept = {int(path.name) for path in Path(tmp_path / "run" / "checkpoints").iterdir()}
    assert {28, 56, 70} <= kept and len(kept) <= 4  # the newest, perhaps the best, and those of epochs 2 and 4

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "28" / "state")
    assert view.trail(epath.Path(tmp_path) / "run")["step"].tolist() == sorted(kept - {28})
    assert "leaves out step 28" in caplog.text
