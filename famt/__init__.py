"""The FAMT method as pure tensor code: scores, geometry, sampling and the masked autoencoder.

It reads no files and starts no processes, and can be used on its own.
"""
