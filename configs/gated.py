"""Gated attention (GPSA of ConViT, d'Ascoli et al. 2021): each head weighs content against a quadratic position.

python main.py --config=configs/gated.py         # CIFAR-10, 300 epochs
python main.py --config=configs/gated.py:small   # CIFAR-10 at laptop scale, 72 minutes on one core: 0.808
python main.py --config=configs/gated.py:digits  # no download, about a minute on 2 cores

29.4M parameters, 15 GFLOPs an image. Not the paper's; heads start on a 3x3 window, as a convolution's.
"""

from configs import common


def get_config(scale=""):
    config = common.attention(scale, "gated")
    config.model.init = "grid"
    return config
