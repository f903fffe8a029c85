"""Quadratic encoding with 16 heads instead of 9 (the paper's appendix).

python main.py --config=configs/many_heads.py         # CIFAR-10, 300 epochs
python main.py --config=configs/many_heads.py:small   # CIFAR-10 at laptop scale, 73 minutes on one core: 0.825
python main.py --config=configs/many_heads.py:digits  # no download, about a minute on 2 cores

18.8M parameters, 9.6 GFLOPs an image.
"""

from configs import common


def get_config(scale=""):
    config = common.attention(scale, "quadratic")
    config.model.heads = 16
    return config
