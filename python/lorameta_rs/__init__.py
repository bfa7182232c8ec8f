"""LoRA adapters for new datasets, from a bank of adapters, without training."""
