"""A study: one file from text to verdict. What it compares and how it decides is fixed before anything runs."""
