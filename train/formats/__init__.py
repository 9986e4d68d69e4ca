"""SAE files of this and other programs: one reader and one writer per format."""
