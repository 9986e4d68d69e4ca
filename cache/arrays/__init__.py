"""Vectors of any origin: arrays in files, cut into sequences and rows, become a store."""
