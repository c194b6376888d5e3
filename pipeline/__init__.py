"""The data plane: tar shards, the score cache, the DALI loader, and the join of the two.

The only package that knows tars, zarr and DALI.
"""
