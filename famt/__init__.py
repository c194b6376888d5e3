"""The FAMT method as pure tensor code: scores, geometry, sampling and the masked autoencoder.

Nothing in this package reads a file or starts a process; it can be used on its own.
"""
