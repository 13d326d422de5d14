"""Ways to train one network on one batch, all behind one protocol (`rival.py`), one file a family."""
