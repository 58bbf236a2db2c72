"""Scores: `(site) -> tensor of the weight's shape`; what scores lowest goes first."""
