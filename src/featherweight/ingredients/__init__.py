"""Pure functions that fill the slots of the verbs: a folder is a slot, a file a formula and the methods made of it."""
