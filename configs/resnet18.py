"""The convolutional baseline: ResNet-18 (the paper's section 4.1).

python main.py --config=configs/resnet18.py         # CIFAR-10, 300 epochs
python main.py --config=configs/resnet18.py:small   # CIFAR-10 at laptop scale, 15 epochs
python main.py --config=configs/resnet18.py:digits  # no download, about a minute on 2 cores

11.2M parameters, 1.1 GFLOPs an image. The paper's test accuracy is 0.938.
"""

from configs import common


def get_config(scale=""):
    return common.resnet18(scale)
