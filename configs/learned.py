"""Learned relative encoding, position only (the paper's section 4.3).

python main.py --config=configs/learned.py         # CIFAR-10, 300 epochs
python main.py --config=configs/learned.py:small   # CIFAR-10 at laptop scale, 48 minutes on one core: 0.819
python main.py --config=configs/learned.py:digits  # no download, about a minute on 2 cores

12.3M parameters, 6.2 GFLOPs an image. The paper's test accuracy is 0.918.
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned")
