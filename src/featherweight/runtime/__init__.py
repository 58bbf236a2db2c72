"""Kernels that execute what was compressed, and `accelerate`, which puts them where they are faster."""

from featherweight.runtime.acceleration import Executed, accelerate, executed

__all__ = ["Executed", "accelerate", "executed"]
