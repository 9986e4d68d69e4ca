"""Stage two: windows of a store become sparse autoencoders. Knows nothing of language models."""
