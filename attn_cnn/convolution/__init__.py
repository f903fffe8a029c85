"""The theorem, executable in both directions (paper, Theorem 1).

`attention_from_convolution` and `convolution_from_attention` are in `theorem.py`; `express.py` does the first to a
trained network, `recover.py` asks of a trained network how much of the second there is, and `moves.py` says where the
heads of an expressed network went in training. Their commands are in `__main__.py`.
"""

from attn_cnn.convolution.theorem import attention_from_convolution, convolution_from_attention

__all__ = ["attention_from_convolution", "convolution_from_attention"]
