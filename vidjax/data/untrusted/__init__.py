"""Bytes of unknown origin, read in a sandbox and checked: standard library and numpy alone."""
