"""dlfast.fuse: what it finds, what it leaves alone, and what users do to a fused model."""
