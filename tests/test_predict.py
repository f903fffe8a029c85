"""Pictures of any size become class names and probabilities, as the run's own test images do."""

import flax.linen as nn
import numpy as np
import PIL.Image
import program
import pytest

from attn_cnn import load_run, predict, train
from attn_cnn.errors import UserError
from attn_cnn.training import data, pictures
from configs import quadratic


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = program.tiny_config(quadratic)
    config.epochs = 1
    workdir = tmp_path_factory.mktemp("predict") / "run"
    train.train(config, workdir)
    return workdir


@pytest.mark.slow
def test_the_runs_own_test_images_are_predicted_as_its_evaluation_counts_them(workdir):
    digits, run = data.load("digits"), load_run(workdir)
    probabilities = predict.predict(run, digits.test_images)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    accuracy = (probabilities.argmax(-1) == digits.test_labels).mean()
    assert accuracy == pytest.approx(train.evaluate(run.config, workdir)["accuracy"])


@pytest.mark.slow
def test_images_are_predicted_in_batches_of_eval_batch_size_as_they_are_one_by_one():
    run = load_run(program.WORKDIRS / "quadratic")
    run.config.eval_batch_size, images, sizes = 2, data.load("digits").test_images[:3], set()

    def keep_size(next_call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            sizes.add(len(args[0]))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(keep_size):
        together = predict.predict(run, images)
    assert sizes == {2, 1}
    alone = [predict.predict(run, image[None]) for image in images]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5)


@pytest.mark.slow
def test_the_command_prints_names_and_probabilities(workdir, tmp_path):
    digits = data.load("digits")
    for i in range(2):
        PIL.Image.fromarray(digits.test_images[i, ..., 0]).resize((50, 40)).convert("RGB").save(tmp_path / f"{i}.png")
    done = program.run(f"--workdir={workdir}", "--config.epochs=1", "--mode=predict", f"--images={tmp_path}/*.png")
    lines = done.stdout.splitlines()
    assert lines[2].startswith("0.png") and lines[3].startswith("1.png") and lines[2].count("%") == predict.SHOWN
    other = ("--config.model.heads=4", "--mode=predict", f"--images={tmp_path}/0.png")
    done = program.run(f"--workdir={workdir}", *other, check=False)
    assert done.returncode == 1 and "model.heads: 9 then, 4 now" in done.stderr and not done.stdout


def test_a_picture_is_resized_and_grey_where_there_is_one_channel(tmp_path):
    PIL.Image.new("RGBA", (31, 17), (255, 0, 0, 255)).save(tmp_path / "red.png")
    path = predict.find_pictures([str(tmp_path / "red.png")])[0]
    assert pictures.read(path, (8, 6, 1)).shape == (8, 6, 1)
    assert pictures.read(path, (8, 6, 3))[0, 0].tolist() == [255, 0, 0]


def test_a_file_that_is_missing_or_no_picture_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.png, which is no file"):
        predict.find_pictures([str(tmp_path / "nothing.png")])
    with pytest.raises(UserError, match="--mode=predict needs pictures, as in --images=cat.png"):
        predict.find_pictures([])
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png is no picture"):
        pictures.read(predict.find_pictures([str(tmp_path / "text.png")])[0], (8, 8, 1))


@pytest.mark.parametrize("mode, pixel", [("RGBA", (200, 100, 50)), ("LA", (200,))])
def test_what_is_transparent_is_black(tmp_path, mode, pixel):
    picture = np.array([[(*pixel, 0), (*pixel, 255)]], np.uint8)
    PIL.Image.fromarray(picture, mode).save(tmp_path / "half.png")
    seen = pictures.read(predict.find_pictures([str(tmp_path / "half.png")])[0], (1, 2, len(pixel)))
    assert seen[0, 0].tolist() == [0] * len(pixel) and seen[0, 1].tolist() == list(pixel)
