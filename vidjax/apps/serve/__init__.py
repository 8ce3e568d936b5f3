"""The server of `vidjax serve`: a JSON API for a gallery, and the Open Inference Protocol."""
