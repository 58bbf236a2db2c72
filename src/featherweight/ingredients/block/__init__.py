"""Slot `block`: what takes the place of a convolution, `(layer, **settings) -> module`, or why it cannot."""
