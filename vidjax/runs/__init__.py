"""The folder of a run: its files, logs and checkpoints, and the signals that stop it. No maths."""
