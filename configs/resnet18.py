"""The convolutional baseline: ResNet-18 (the paper's section 4.1).

python main.py --config=configs/resnet18.py         # CIFAR-10, 300 epochs
python main.py --config=configs/resnet18.py:small   # CIFAR-10 at laptop scale, 56 minutes on one core: 0.857
python main.py --config=configs/resnet18.py:digits  # no download, about a minute on 2 cores

11.2M parameters, 1.1 GFLOPs an image. The paper's test accuracy is 0.938.
"""

import ml_collections

from configs import common

SMALL = common.SMALL_RUN | {
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.05,
    "optimizer.decay_epochs": (),
    "model.width": 14,  # as many parameters as quadratic.py:small, 2% more
}

DIGITS = common.DIGITS_RUN | {
    "optimizer.decay_epochs": (30, 50),
    "model.width": 16,
}


def get_config(scale=""):
    config = common.run()
    config.optimizer.schedule = "step"  # a tenth after each of decay_epochs
    config.optimizer.warmup = 0.0
    config.optimizer.decay_epochs = (80, 150, 250)
    config.model = ml_collections.ConfigDict(
        {
            "name": "resnet18",
            "image_shape": (32, 32, 3),
            "classes": 10,
            "width": 64,  # channels of the first stage
            "layer": "convolution",  # or attention, which starts as a 3x3 window of heads
        }
    )
    return common.at_scale(config, scale, {"": {}, "small": SMALL, "digits": DIGITS})
