"""Stage one: text → rows of tokens → one truncated forward pass → a store per layer."""
