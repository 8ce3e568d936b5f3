"""The command line: the flags of every command, and what it prints."""
