"""Stage three: SAEs and their language model become a report."""
