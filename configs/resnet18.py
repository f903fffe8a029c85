"""The convolutional baseline: ResNet-18 (the paper's section 4.1).

python main.py --config=configs/resnet18.py         # CIFAR-10, 300 epochs: 11.2M parameters, 1.1 GFLOPs an image; the paper's test accuracy is 0.938
python main.py --config=configs/resnet18.py:small   # CIFAR-10, 15 epochs: SMALL_resnet18
python main.py --config=configs/resnet18.py:digits  # no download, 1 minute: DIGITS_resnet18
"""

from configs import common


def get_config(scale=""):
    return common.resnet18(scale)
