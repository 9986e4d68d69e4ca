"""Any causal language model, its hook points, and its forward pass."""
