"""Ways to train one network on one batch, behind one protocol (`rival.py`), with one file per family."""
