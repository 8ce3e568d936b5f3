"""The folder of a run: its files, logs, checkpoints and signals. No maths."""
