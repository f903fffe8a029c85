"""Learned relative encoding with query and content (the paper's section 4.3).

python main.py --config=configs/learned_content.py         # CIFAR-10, 300 epochs: 29.5M parameters, 15 GFLOPs an image; the paper's test accuracy is 0.871
python main.py --config=configs/learned_content.py:small   # CIFAR-10, 15 epochs: SMALL_learned_content
python main.py --config=configs/learned_content.py:digits  # no download, 1 minute: DIGITS_learned_content
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned_content")
