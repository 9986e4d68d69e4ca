"""The activation cache: what is on disk, and how it is written, read, windowed, measured and verified."""
