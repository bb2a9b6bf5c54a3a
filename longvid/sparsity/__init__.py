"""Sparse attention policies: which tiles of an attention are computed, one policy a file."""
