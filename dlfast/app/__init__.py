"""The program around the library, ``dlfast train`` and so on. Nothing outside of this package imports it."""
