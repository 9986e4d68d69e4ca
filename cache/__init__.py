"""The activation store: written once, read by everything else. It imports nothing of the packages above it."""
