"""Intervals: bootstrap and jackknife over the text."""
