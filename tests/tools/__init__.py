"""The tools that check this repository."""
