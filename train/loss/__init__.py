"""What is minimised: the objective, its temporal terms, and the partners they compare."""
