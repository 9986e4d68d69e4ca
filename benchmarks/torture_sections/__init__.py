"""What benchmarks/torture.py does: a file for each kind of harm, and what all of them need."""
