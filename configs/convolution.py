"""The quadratic network with 3x3 convolutions in place of attention: its twin, everything else being equal.

python main.py --config=configs/convolution.py          # CIFAR-10, 300 epochs
python main.py --config=configs/convolution.py:small    # CIFAR-10 at laptop scale, 44 minutes on one core: 0.826
python main.py --config=configs/convolution.py:pyramid  # the same with a grid that halves, 38 minutes on 2 cores: 0.840
python main.py --config=configs/convolution.py:digits   # no download, about a minute on 2 cores

12.1M parameters, 6.2 GFLOPs an image. Not the paper's.
"""

from configs import common


def get_config(scale=""):
    config = common.attention(scale, "quadratic")
    config.model.layer = "convolution"
    return config
