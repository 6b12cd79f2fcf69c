"""Sparse direct factor of the weight constraints: nested dissection, its fronts, and a sketch for the other rows."""
