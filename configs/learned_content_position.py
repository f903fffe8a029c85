"""Learned relative encoding beside content: the query enters the score of content alone.

python main.py --config=configs/learned_content_position.py         # CIFAR-10, 300 epochs
python main.py --config=configs/learned_content_position.py:small   # at laptop scale, 62 minutes on one core: 0.788
python main.py --config=configs/learned_content_position.py:digits  # no download, about a minute on 2 cores

29.6M parameters, 15 GFLOPs an image. Not in the paper's Table 1, where "learned + content" is learned_content.
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned_content_position")
