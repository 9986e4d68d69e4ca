"""The activation store: written once, read by everything else; adoptable by itself."""
