"""Code of csrc by itself, and what compilers make of it."""
