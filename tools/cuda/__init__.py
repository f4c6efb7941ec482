"""Looks at the CUDA kernels: their machine code, what they move on the emulator, and how they run on a GPU."""
