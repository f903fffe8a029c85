"""Learned relative encoding beside content: the paper's "learned + content" (its section 4.3).

python main.py --config=configs/learned_content_position.py         # CIFAR-10, 300 epochs
python main.py --config=configs/learned_content_position.py:small   # CIFAR-10 at laptop scale, 6 epochs
python main.py --config=configs/learned_content_position.py:digits  # no download, about a minute on 2 cores

29.6M parameters, 15 GFLOPs an image. Position alone scores with learned tables, content with query and key.
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned_content_position")
