"""The server of `vidjax serve`: a JSON API for a gallery."""
