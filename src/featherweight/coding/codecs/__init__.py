"""Codecs: how tensors are packed while they travel."""
