"""Quadratic encoding, 9 heads: the paper's main model (its section 3.1).

python main.py --config=configs/quadratic.py          # CIFAR-10, 300 epochs
python main.py --config=configs/quadratic.py:small    # CIFAR-10 at laptop scale, 48 minutes on one core: 0.821
python main.py --config=configs/quadratic.py:pyramid  # the same with a grid that halves, 46 minutes on 2 cores: 0.834
python main.py --config=configs/quadratic.py:digits   # no download, about a minute on 2 cores

12.1M parameters, 6.2 GFLOPs an image. The paper's test accuracy is 0.938.
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "quadratic")
