"""What can be read from codes: sparse probes, and the seams of spliced documents. None of it is in any loss."""
