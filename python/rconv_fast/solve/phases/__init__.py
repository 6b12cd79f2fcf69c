"""Gradient constraints by stride phases: their Gram matrices, the factors of these, the direct solution."""
