"""Any text, read in order as rows of tokens."""
