"""Tests, in the folders of what they test; those of single files of dlfast stand here."""
