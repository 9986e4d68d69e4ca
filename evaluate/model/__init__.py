"""The language model under evaluation: text, splices, reference rows, probes."""
