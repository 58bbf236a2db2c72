"""Entropy coders and layouts of symbol streams, one file each."""
