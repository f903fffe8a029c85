"""Checkpoints of the paper's PyTorch code become workdirs of ours; what does not fit is named."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest
from etils import epath
from flax import traverse_util
from golden import Golden, assert_close

from attn_cnn import report, train
from attn_cnn.errors import UserError
from attn_cnn.model import abstract_variables, create_model
from attn_cnn.torch_import import import_checkpoint, import_state_dict, import_variables, read_checkpoint, torch_names
from attn_cnn.training.runs import load_run
from configs import gated, quadratic, resnet18


def test_every_misfit_is_named():
    golden = Golden("quadratic")
    state = golden.state_dict()
    state["extra.weight"] = np.zeros(3)
    del state["classifier.bias"]
    state["features_upscale.weight"] = np.zeros((12, 13))
    state["encoder.layer.0.intermediate.dense.bias"] = np.array([object()] * 20)
    with pytest.raises(UserError) as error:
        import_state_dict(state, golden.model())
    for words in (
        "left over: extra.weight",
        "missing: classifier.bias",
        "features_upscale.weight has shape (12, 13) instead of (12, 12)",
        "encoder.layer.0.intermediate.dense.bias holds object",
    ):
        assert words in str(error.value)


def test_a_state_dict_of_another_encoding_is_refused():
    with pytest.raises(UserError, match=r"missing: .*attention_centers"):
        import_state_dict(Golden("learned").state_dict(), Golden("quadratic").model())


def test_an_encoding_that_the_original_lacks_is_refused():
    with pytest.raises(UserError, match="the gated encoding is not in the paper's code"):
        import_state_dict({}, gated.get_config("digits").model)


def test_a_layer_that_the_original_lacks_is_refused():
    golden = Golden("quadratic")
    with pytest.raises(UserError, match="the paper's code has no convolution layers; set config.model.layer"):
        import_state_dict(golden.state_dict(), golden.model(layer="convolution"))


def test_buffers_are_no_parameters():
    golden = Golden("learned")
    state = golden.state_dict() | {"encoder.layer.0.attention.self.relative_indices": np.zeros((8, 8), int)}
    import_state_dict(state, golden.model())


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["learned", "learned_query"])
def test_shared_tables_must_be_the_same_in_every_layer(encoding):
    golden = Golden(encoding)
    state, model = golden.state_dict(), golden.model(share_tables=True)
    with pytest.raises(UserError, match="differs from layer to layer"):
        import_state_dict(state, model)
    for axis in ("row", "col"):
        name = "encoder.layer.{}.attention.self." + axis + "_embeddings.weight"
        state[name.format(1)] = state[name.format(0)]
    shared = create_model(model).apply({"params": import_state_dict(state, model)}, golden.images)
    own = create_model(golden.model())
    assert_close(shared, own.apply({"params": import_state_dict(state, golden.model())}, golden.images))


def resnet_state_dict(model):
    """Random parameters under the names and shapes of the original's ResNet-18."""
    rng = np.random.default_rng(0)
    state = {}

    def conv(name, inputs, outputs, kernel):
        state[f"{name}.weight"] = rng.normal(size=(outputs, inputs, kernel, kernel)) / (kernel * inputs**0.5)

    def norm(name, size):
        for leaf, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            state[f"{name}.{leaf}"] = value + 0.1 * np.abs(rng.normal(size=size))
        state[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", 3, model.width, 3)
    norm("bn1", model.width)
    inputs = model.width
    for layer, multiple in enumerate((1, 2, 4, 8), start=1):
        for block in range(2):
            outputs, prefix = model.width * multiple, f"layer{layer}.{block}"
            conv(f"{prefix}.conv1", inputs, outputs, 3)
            norm(f"{prefix}.bn1", outputs)
            conv(f"{prefix}.conv2", outputs, outputs, 3)
            norm(f"{prefix}.bn2", outputs)
            if inputs != outputs:
                conv(f"{prefix}.shortcut.0", inputs, outputs, 1)
                norm(f"{prefix}.shortcut.1", outputs)
            inputs = outputs
    state["linear.weight"] = rng.normal(size=(10, inputs)) / inputs**0.5
    state["linear.bias"] = rng.normal(size=10)
    return state


@pytest.mark.slow
def test_resnet_and_its_statistics():
    model = resnet18.get_config("small").model
    variables = import_variables(resnet_state_dict(model), model)
    assert report.count_parameters(variables["params"]) == report.count_parameters(abstract_variables(model)["params"])
    logits = create_model(model).apply(variables, jnp.ones((2, 32, 32, 3)))
    assert np.isfinite(logits).all()


def test_resnet_computes_what_pytorch_does():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    functional = torch.nn.functional
    model = resnet18.get_config("small").model
    state = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in resnet_state_dict(model).items()}
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(x, name):
        return functional.batch_norm(
            x, *(state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        )

    x = norm(conv(torch.tensor(images).permute(0, 3, 1, 2), "conv1"), "bn1").relu()
    for layer in range(1, 5):
        for block in range(2):
            prefix, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = norm(conv(x, f"{prefix}.conv1", stride), f"{prefix}.bn1").relu()
            y = norm(conv(y, f"{prefix}.conv2"), f"{prefix}.bn2")
            if f"{prefix}.shortcut.0.weight" in state:
                x = norm(conv(x, f"{prefix}.shortcut.0", stride), f"{prefix}.shortcut.1")
            x = (x + y).relu()
    expected = functional.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])
    ours = create_model(model).apply(import_variables(resnet_state_dict(model), model), jnp.asarray(images))
    assert_close(ours, expected.numpy())


def digits_state_dict(config):
    """A state dict that fits `config`, in PyTorch's shapes."""
    rng, state = np.random.default_rng(0), {}
    params = traverse_util.flatten_dict(abstract_variables(config.model)["params"])
    for path, leaf in params.items():
        (name,) = torch_names(path, config.model)
        shape = leaf.shape
        if path[-1] == "kernel":
            outputs = shape[-1]
            shape = (outputs, int(np.prod(shape[:-1])))
        state[name] = rng.normal(size=shape).astype(np.float32) * 0.1
    return state


@pytest.mark.slow
def test_an_npz_becomes_a_workdir_that_evaluates_and_resumes(tmp_path):
    config = quadratic.get_config("digits")
    config.epochs, config.model.layers = 1, 1
    np.savez(tmp_path / "model.npz", **digits_state_dict(config))
    workdir = epath.Path(tmp_path) / "run"
    assert import_checkpoint(epath.Path(tmp_path) / "model.npz", config, workdir) == 0
    before = train.evaluate(config, workdir)
    state = train.train(config, workdir)
    assert int(state.step) == 14
    assert train.evaluate(config, workdir)["loss"] != before["loss"]


@pytest.mark.slow
def test_a_checkpoint_of_the_original_resumes_after_its_epoch(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    config = quadratic.get_config("digits")
    config.epochs, config.model.layers = 3, 1
    state = {name: torch.tensor(array) for name, array in digits_state_dict(config).items()}
    content = {"epoch": 1, "test_accuracy": 0.25, "model_state_dict": state}
    torch.save(content, tmp_path / "final.checkpoint")
    workdir = epath.Path(tmp_path) / "run"
    assert import_checkpoint(epath.Path(tmp_path) / "final.checkpoint", config, workdir) == 2 * 14
    assert int(train.train(config, workdir).step) == 3 * 14


def test_a_pickle_is_not_executed(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch")

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model_state_dict": Malicious()}, tmp_path / "evil.checkpoint")
    with pytest.raises(UserError, match="no checkpoint that can be loaded safely"):
        read_checkpoint(epath.Path(tmp_path) / "evil.checkpoint")
    np.savez(tmp_path / "evil.npz", array=np.array([Malicious()], dtype=object))
    with pytest.raises(UserError, match="no .npz of plain arrays"):
        read_checkpoint(epath.Path(tmp_path) / "evil.npz")
    assert not (tmp_path / "executed").exists()


def test_without_pytorch_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UserError, match="pip install torch, or pass an .npz"):
        read_checkpoint(epath.Path(tmp_path) / "x.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.npz does not exist"):
        read_checkpoint(epath.Path(tmp_path) / "nothing.npz")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04", b"no checkpoint"])
@pytest.mark.parametrize("name", ["model.npz", "model.checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_checkpoint(epath.Path(tmp_path) / name)


def wrapped(state, kind):
    """A state dict as training scripts save it."""
    if kind == "bare":
        return state
    if kind == "wrapped by modules":
        return {"state_dict": {f"module._orig_mod.{name}": array for name, array in state.items()}}
    return {"net": state, "acc": 91.5, "epoch": 4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bare", "wrapped by modules", "net, acc, epoch"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_files_as_people_have_them_are_read(kind, precision, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    golden = Golden("quadratic")
    dtype = getattr(torch, precision)
    state = {name: torch.tensor(array).to(dtype) for name, array in golden.state_dict().items()}
    torch.save(wrapped(state, kind), tmp_path / "model.pt")
    state_dict, epochs, accuracy = read_checkpoint(epath.Path(tmp_path) / "model.pt")
    assert (epochs, accuracy) == ((5, 0.915) if kind == "net, acc, epoch" else (0, None))
    params = import_state_dict(state_dict, golden.model())
    expected = import_state_dict(golden.state_dict(), golden.model())
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[precision]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-4), params, expected)


@pytest.mark.parametrize(
    "encoding, changes, cause",
    [
        ("learned", {}, "its encoding is quadratic or quadratic_generalized: give --config=configs/quadratic.py"),
        ("quadratic", {"layers": 5}, "it has 2 layers: set config.model.layers"),
    ],
)
def test_the_one_thing_that_is_off_comes_first(encoding, changes, cause):
    model = Golden(encoding).model(**changes)
    with pytest.raises(UserError) as error:
        import_state_dict(Golden("quadratic").state_dict(), model)
    assert cause in str(error.value).splitlines()[0]


def test_a_resnet_is_told_from_attention():
    with pytest.raises(UserError, match="it is a ResNet's"):
        import_state_dict(resnet_state_dict(resnet18.get_config("small").model), Golden("quadratic").model())
    with pytest.raises(UserError, match="it is no ResNet's"):
        import_state_dict(Golden("quadratic").state_dict(), resnet18.get_config("small").model)


# The commands


@pytest.mark.slow
def test_a_run_that_is_exported_and_imported_by_the_commands_is_the_same_run(tmp_path):
    workdir, file, again = program.WORKDIRS / "quadratic", tmp_path / "run.npz", tmp_path / "again"
    exported = program.run_module("attn_cnn.torch_export", file, f"--workdir={workdir}")
    assert exported.returncode == 0, exported.stderr
    config = load_run(workdir).config
    fields = {name: config.model[name] for name in ("layers", "hidden_size", "mlp_size", "heads")}
    flags = ["--config=configs/quadratic.py:digits", *(f"--config.model.{n}={v}" for n, v in fields.items())]
    imported = program.run_module("attn_cnn.torch_import", file, *flags, f"--workdir={again}")
    assert imported.returncode == 0, imported.stderr
    jax.tree.map(np.testing.assert_array_equal, load_run(again).params, load_run(workdir).params)
    without = program.run_module("attn_cnn.torch_import", *flags, f"--workdir={tmp_path / 'new'}")
    assert without.returncode == 1 and "CHECKPOINT is missing; the command takes CHECKPOINT beside" in without.stderr
