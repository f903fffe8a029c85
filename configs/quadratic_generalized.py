"""Quadratic encoding with a full 2x2 covariance for each head (the paper's section 4.2).

python main.py --config=configs/quadratic_generalized.py         # CIFAR-10, 300 epochs
python main.py --config=configs/quadratic_generalized.py:small   # CIFAR-10 on a laptop, 36 minutes on one core: 0.825
python main.py --config=configs/quadratic_generalized.py:digits  # no download, about a minute on 2 cores

12.1M parameters, 6.2 GFLOPs an image. Dense by nature: the covariance couples rows and columns.
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "quadratic_generalized")
