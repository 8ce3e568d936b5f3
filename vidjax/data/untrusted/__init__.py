"""Bytes of strangers: pickles are opened in a sandbox, arrays are checked before use."""
