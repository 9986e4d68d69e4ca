"""Stage three: SAEs and a language model → fidelity, features, time and position → a report."""
