"""Exports runs and galleries to the formats of other runtimes, and imports runs again."""
