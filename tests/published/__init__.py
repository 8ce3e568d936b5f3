"""Compares `CONFIG:published` with the numbers of its publication and code."""
