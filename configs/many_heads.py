"""Quadratic encoding with 16 heads instead of 9 (the paper's appendix).

python main.py --config=configs/many_heads.py         # CIFAR-10, 300 epochs: 18.8M parameters, 9.6 GFLOPs an image
python main.py --config=configs/many_heads.py:small   # CIFAR-10, 15 epochs: SMALL_many_heads
python main.py --config=configs/many_heads.py:digits  # no download, 1 minute: DIGITS_many_heads
"""

from configs import common


def get_config(scale=""):
    config = common.attention(scale, "quadratic")
    config.model.heads = 16
    return config
