"""The interactive page of a run: one HTML file, whose scripts compute the attention, and the network, in the browser.

`view.py` says what the page knows of a run, `network.py` turns its network into steps that the browser takes, `page.py`
joins both with the scripts in `static/`, and `__main__.py` is the command.
"""
