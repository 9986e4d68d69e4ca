"""A store of an SAE's sparse codes: written once over a store of activations, read by everything about features."""
