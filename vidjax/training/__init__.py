"""Trains models. `plan` prepares a run, `loop` repeats training steps, and `feed` gives them clips.

`api` contains the public functions, which `import vidjax` offers, too.
"""
