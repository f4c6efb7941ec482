"""What this repository is checked with; run from its root, as in ``python -m tools.seams``. Not part of the package."""
