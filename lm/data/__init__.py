"""Text in, token rows out: numpy only, never jax."""
