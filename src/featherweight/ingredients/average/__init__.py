"""Slot `average`: the weights of several teachers, `count -> (count,)`, asked for at every step."""
