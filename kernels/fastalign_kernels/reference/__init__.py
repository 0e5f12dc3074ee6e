"""The PyTorch twins: the CPU path, the baseline and the oracle of every kernel."""
