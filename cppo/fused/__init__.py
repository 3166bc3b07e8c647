"""The fused ops: primitives of a backend, and the one loss that is composed of them."""
