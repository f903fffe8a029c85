"""The paper's network with quadratic heads in PyTorch, dense: what `benchmarks.gpu` measures ours against.

    A_h[q, k] = softmax over k of -1/2 s_h^2 |k - q - mu_h|^2        (paper, eq. 9)
    output[q] = sum_h (sum_k A_h[q, k] x[k]) W_h + b                  (paper, eq. 3)

All probabilities are computed, and one product mixes the pixels for all heads, as in the paper's code. Parameters have
the names of that code, so that `load_state_dict` takes what `attn_cnn.torch_export` writes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_cnn.model import LAYER_NORM_EPSILON


class QuadraticAttention(nn.Module):
    """Attention of quadratic heads on a square grid.

    Attributes:
      attention_centers: mu_h, (heads, 2), as row and column.
      attention_spreads: s_h, (heads,).
      value: W, which maps what all heads mixed.
      shifts: key minus query, (pixels, pixels, 2).
    """

    def __init__(self, heads: int, features: int, side: int):
        super().__init__()
        self.attention_centers = nn.Parameter(torch.randn(heads, 2))
        self.attention_spreads = nn.Parameter(1 + 0.01 * torch.randn(heads))
        self.value = nn.Linear(heads * features, features)
        pixels = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        self.register_buffer("shifts", pixels[None] - pixels[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, pixels, features) for the same."""
        distances = (self.shifts - self.attention_centers[:, None, None]).square().sum(-1)
        A = torch.softmax(-0.5 * self.attention_spreads[:, None, None] ** 2 * distances, -1)
        return self.value(torch.einsum("hqk,bkd->bqhd", A.to(x.dtype), x).flatten(2))


class EncoderLayer(nn.Module):
    """Attention and a perceptron, each with its residual connection and LayerNorm behind it."""

    def __init__(self, heads: int, features: int, mlp_size: int, side: int):
        super().__init__()
        self.attention = nn.ModuleDict({"self": QuadraticAttention(heads, features, side)})
        self.attention["output"] = _dense_and_norm(features, features)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(features, mlp_size)})
        self.output = _dense_and_norm(mlp_size, features)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, pixels, features) for the same."""
        x = self.attention["output"]["LayerNorm"](x + self.attention["output"]["dense"](self.attention["self"](x)))
        m = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + m)


class QuadraticClassifier(nn.Module):
    """Images to logits, as the paper's network without dropout.

    Args:
      model: `config.model` of an experiment with the quadratic encoding.
    """

    def __init__(self, model):
        super().__init__()
        height, _, channels = model.image_shape
        self.patch, side = model.patch, height // model.patch
        self.features_upscale = nn.Linear(model.patch**2 * channels, model.hidden_size)
        layers = [EncoderLayer(model.heads, model.hidden_size, model.mlp_size, side) for _ in range(model.layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.classifier = nn.Linear(model.hidden_size, model.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes) for normalised images (batch, height, width, channels)."""
        batch, height, width, channels = images.shape
        grid = images.view(batch, height // self.patch, self.patch, width // self.patch, self.patch, channels)
        x = self.features_upscale(grid.transpose(2, 3).reshape(batch, -1, self.patch**2 * channels))
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.classifier(x.mean(1))


def _dense_and_norm(inputs: int, features: int) -> nn.ModuleDict:
    norm = nn.LayerNorm(features, eps=LAYER_NORM_EPSILON)
    return nn.ModuleDict({"dense": nn.Linear(inputs, features), "LayerNorm": norm})


def training_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Returns what makes one update by SGD with momentum, with products in `dtype`; each call is one."""
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=1e-4)

    def step():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
