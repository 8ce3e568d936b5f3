"""Exports runs to the formats of other runtimes, and imports the exports."""
