"""Features of people from videos and photos: decoding, shots, tracks, models from files with cards.

No module here imports jax, TensorFlow or torch, and `decode` alone imports the library that reads
media. Bytes of videos are decoded in child processes with limits; see `child`.
"""
