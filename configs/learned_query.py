"""Learned relative encoding that meets the query (Ramachandran et al. 2019).

python main.py --config=configs/learned_query.py         # CIFAR-10, 300 epochs: 20.8M parameters, 11 GFLOPs an image
python main.py --config=configs/learned_query.py:small   # CIFAR-10, 15 epochs: SMALL_learned_query
python main.py --config=configs/learned_query.py:digits  # no download, 1 minute: DIGITS_learned_query
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned_query")
