"""The machine this runs on and its files: devices, memory, signals, files that are written whole or read warily."""
