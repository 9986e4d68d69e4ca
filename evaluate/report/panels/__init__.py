"""The charts of the report, section by section."""
