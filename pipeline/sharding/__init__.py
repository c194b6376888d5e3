"""Tars: patterns of their names, their contents, and how they are made of images."""
