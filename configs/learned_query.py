"""Learned relative encoding that meets the query (Ramachandran et al. 2019).

python main.py --config=configs/learned_query.py         # CIFAR-10, 300 epochs
python main.py --config=configs/learned_query.py:small   # CIFAR-10 at laptop scale, 36 minutes on one core: 0.773
python main.py --config=configs/learned_query.py:digits  # no download, about a minute on 2 cores

20.8M parameters, 11 GFLOPs an image.
"""

from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned_query")
