"""Training a finished run's SAE further, through the upper layers of its language model."""
