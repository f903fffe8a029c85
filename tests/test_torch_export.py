"""The way back to the paper's PyTorch names: importing what was exported gives the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from golden import ENCODINGS, Golden, small_model

from attn_cnn.errors import UserError
from attn_cnn.model import abstract_variables
from attn_cnn.torch_export import export_run, export_variables
from attn_cnn.torch_import import import_state_dict, import_variables, read_checkpoint
from attn_cnn.training.data import SPECS
from attn_cnn.training.runs import Run
from configs import quadratic, resnet18


def random_variables(model):
    """Returns variables of the shapes that `model` has."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), abstract_variables(model))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_state_dict_of_the_paper_comes_back_name_by_name(encoding):
    golden = Golden(encoding)
    params = import_state_dict(golden.state_dict(), golden.model())
    exported = export_variables({"params": params}, golden.model())
    theirs = {name: array for name, array in golden.state_dict().items() if not name.endswith("relative_indices")}
    assert exported.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(exported[name], array.astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    "model",
    [
        small_model("quadratic", heads=(4, 0)),
        small_model("learned", share_tables=True),
        resnet18.get_config("digits").model,
    ],
    ids=["a layer without heads", "shared tables", "resnet"],
)
def test_what_is_exported_is_imported_as_it_was(model):
    variables = random_variables(model)
    again = import_variables(export_variables(variables, model), model)
    jax.tree.map(np.testing.assert_array_equal, again, {"batch_stats": {}} | variables)


def run_of(config):
    variables = random_variables(config.model)
    return Run(None, variables["params"], variables.get("batch_stats", {}), config, (0.5,), (0.5,), 28, SPECS["digits"])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_each_kind_of_file_holds_it(suffix, tmp_path):
    if suffix == ".pt":
        pytest.importorskip("torch", reason="needs PyTorch")
    config = quadratic.get_config("digits")
    config.model.layers = 1
    run, path = run_of(config), epath.Path(tmp_path) / "a folder to be made" / f"model{suffix}"
    export_run(run, path)
    state_dict, epochs, accuracy = read_checkpoint(path)
    jax.tree.map(np.testing.assert_array_equal, import_state_dict(state_dict, config.model), run.params)
    assert epochs == (2 if suffix == ".pt" else 0) and accuracy is None


def test_an_ending_that_is_none_of_them_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model.onnx must end in one of .pt, .safetensors, .npz"):
        export_run(run_of(quadratic.get_config("digits")), epath.Path(tmp_path) / "model.onnx")


def test_a_grid_that_halves_is_not_in_the_papers_code():
    config = quadratic.get_config("digits")
    config.model.merge_before = (1,)
    with pytest.raises(UserError, match="no grid that halves; set config.model.merge_before to"):
        export_run(run_of(config), epath.Path("model.npz"))
