"""attn_cnn: self-attention that expresses convolution, in JAX and Flax.

Cordonnier, Loukas and Jaggi, "On the Relationship between Self-Attention and Convolutional Layers",
ICLR 2020, arXiv:1911.03584.
"""
