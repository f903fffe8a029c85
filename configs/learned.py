from configs import common


def get_config(scale=""):
    return common.attention(scale, "learned")
