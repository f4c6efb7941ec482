"""The operators, on the CPU and on GPUs."""
