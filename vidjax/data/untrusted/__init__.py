"""Reads and checks files from strangers in a sandbox, with numpy and the standard library only."""
