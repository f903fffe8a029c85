"""A quadratic_generalized run without its degenerate heads, trained on (the paper's section 4.2).

python main.py --config=configs/quadratic_pruned.py         # CIFAR-10, 100 epochs after the 300 of the other run
python main.py --config=configs/quadratic_pruned.py:small   # CIFAR-10 on a laptop, 15 minutes on one core: 0.833
python main.py --config=configs/quadratic_pruned.py:digits  # no download, half a minute on 2 cores

12.1M parameters, 6.2 GFLOPs an image, before heads are pruned. It starts from runs/quadratic_generalized[_<scale>],
which must be finished, or from another run: --config.init_from=WORKDIR. What remains depends on it;
`python -m attn_cnn.heads report` shows it.
"""

from configs import quadratic_generalized

EPOCHS = {"": 100, "small": 5, "pyramid": 5, "digits": 20}


def get_config(scale=""):
    config = quadratic_generalized.get_config(scale)
    config.update_from_flattened_dict(
        {
            "epochs": EPOCHS[scale],
            "init_from": "_".join(filter(None, ("runs/quadratic_generalized", scale))),
            "degenerate_heads": "prune",
            "optimizer.learning_rate": config.optimizer.learning_rate / 10,
        }
    )
    return config
