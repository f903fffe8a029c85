"""Quadratic encoding with a full 2x2 covariance for each head (the paper's section 4.2).

python main.py --config=configs/quadratic_generalized.py         # CIFAR-10, 300 epochs: 12.1M parameters; dense attention by nature, since the covariance couples rows and columns
python main.py --config=configs/quadratic_generalized.py:small   # CIFAR-10, 15 epochs: SMALL_quadratic_generalized
python main.py --config=configs/quadratic_generalized.py:digits  # no download, 1 minute: DIGITS_quadratic_generalized
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "quadratic_generalized")
