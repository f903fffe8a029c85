from configs import common


def get_config(scale=""):
    config = common.attention(scale, "quadratic")
    config.model.heads = 16
    return config
