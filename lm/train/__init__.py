"""One step, one loop, and what they are made of."""
