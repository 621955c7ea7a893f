"""What ranks do together: process groups and the arithmetic of their layout, exchanges, and failing together."""
