"""The page, its tables and its pictures."""
