"""The command line `vidjax`: the flags of all commands, and what each command prints."""
