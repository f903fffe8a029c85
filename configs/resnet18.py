from configs import common


def get_config(scale=""):
    return common.resnet18(scale)
