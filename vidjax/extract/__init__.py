"""Features of people from videos and photos: decoding, shots, tracks, models from files with cards.

No module here imports jax, TensorFlow or torch, and `decode` alone imports the library that reads
media, to be called in a child process with limits (`vidjax.data.untrusted.limits`).
"""
