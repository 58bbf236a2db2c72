"""Reference networks and data sets for the demo, the tests and the benchmarks."""

from featherweight.zoo.data import AUGMENTATIONS, DATA, Batches, task
from featherweight.zoo.networks import NETWORKS, build

__all__ = ["AUGMENTATIONS", "DATA", "NETWORKS", "Batches", "build", "task"]
