"""What executes layers as they were compressed: each takes a baked layer and gives a faster one, or says why not."""
