"""Quadratic encoding, 9 heads: the paper's main model (its section 3.1).

python main.py --config=configs/quadratic.py         # CIFAR-10, 300 epochs: 12.1M parameters, 6.2 GFLOPs an image; the paper's test accuracy is 0.938
python main.py --config=configs/quadratic.py:small   # CIFAR-10, 15 epochs: SMALL_quadratic
python main.py --config=configs/quadratic.py:digits  # no download, 1 minute: DIGITS_quadratic
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "quadratic")
