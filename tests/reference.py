"""The equations of attention in float64 NumPy, written apart from the code under test."""

import numpy as np


def float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def softmax(scores):
    """Returns the softmax over the last two axes."""
    (scores,) = float64(scores)
    scores = np.exp(scores - scores.max((-2, -1), keepdims=True))
    return scores / scores.sum((-2, -1), keepdims=True)


def shifts(height, width):
    """Returns key minus query of a grid, (H, W, H, W, 2)."""
    pixels = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    return pixels[None, None] - pixels[:, :, None, None]


def gaussian_scores(shifts, centers, precisions):
    """Returns -1/2 (d - mu_h)^T P_h (d - mu_h), heads in front."""
    shifts, centers, precisions = float64(shifts, centers, precisions)
    return np.stack(
        [
            -0.5 * np.einsum("...a,ab,...b->...", shifts - center, precision, shifts - center)
            for center, precision in zip(centers, precisions, strict=True)
        ]
    )


def quadratic_scores(shifts, centers, spreads):
    """Returns -1/2 s_h^2 |d - mu_h|^2, heads in front."""
    (spreads,) = float64(spreads)
    return gaussian_scores(shifts, centers, spreads[:, None, None] ** 2 * np.eye(2))


def content_scores(x, query, key):
    """Returns q_h[i, j] . k_h[k, l] / sqrt(D), given the parameters of both maps: (batch, heads, H, W, H, W)."""
    (x,) = float64(x)
    q, k = (
        np.einsum("bijd,dhf->bhijf", x, np.asarray(map["kernel"], np.float64))
        + np.asarray(map["bias"], np.float64)[:, None, None]
        for map in (query, key)
    )
    return np.einsum("bhijf,bhklf->bhijkl", q, k) / x.shape[-1] ** 0.5


def attend(A, x, value):
    """Returns sum_h A_h x W_h + b, given the parameters of the value map."""
    A, x, kernel, bias = float64(A, x, value["kernel"], value["bias"])
    A = np.broadcast_to(A, (len(x), *A.shape[-5:]))
    return np.einsum("bhijkl,bkld,hdo->bijo", A, x, kernel, optimize=True) + bias
