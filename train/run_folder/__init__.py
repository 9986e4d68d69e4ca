"""The folder of a training run: who may write it, its record, its checkpoints and its metrics."""
