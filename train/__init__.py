"""Stage two: windows of a store → sparse autoencoders. Knows nothing of language models."""
