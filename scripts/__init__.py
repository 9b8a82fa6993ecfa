"""The programs. `python -m scripts.NAME` imports this first, and with it what makes Ctrl-C quiet from the start."""

import nanochat  # noqa: F401
