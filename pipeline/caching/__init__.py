"""The score cache: its objects, manifests, and garbage collection."""
