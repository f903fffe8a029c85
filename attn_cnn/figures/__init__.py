"""The paper's figures of any run, and of anyone's attention maps: `python -m attn_cnn.figures --workdir=RUN`.

A file for each figure, on top of `sources.py`, what they are drawn of.
"""
