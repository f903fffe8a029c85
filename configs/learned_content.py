"""Learned relative encoding with query and content (the paper's section 4.3).

python main.py --config=configs/learned_content.py         # CIFAR-10, 300 epochs
python main.py --config=configs/learned_content.py:small   # CIFAR-10 at laptop scale, 65 minutes on one core: 0.760
python main.py --config=configs/learned_content.py:digits  # no download, about a minute on 2 cores

29.5M parameters, 15 GFLOPs an image. The paper's test accuracy is 0.871.
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned_content")
