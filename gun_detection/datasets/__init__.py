"""Data sets: sources, label formats, checks, groups and splits, versions, and reading them."""
