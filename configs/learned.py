"""Learned relative encoding, position only (the paper's section 4.3).

python main.py --config=configs/learned.py         # CIFAR-10, 300 epochs: 12.3M parameters, 6.2 GFLOPs an image; the paper's test accuracy is 0.918
python main.py --config=configs/learned.py:small   # CIFAR-10, 15 epochs: SMALL_learned
python main.py --config=configs/learned.py:digits  # no download, 1 minute: DIGITS_learned
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned")
