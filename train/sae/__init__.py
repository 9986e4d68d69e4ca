"""Sparse autoencoders: architectures, activations, initialisation."""
