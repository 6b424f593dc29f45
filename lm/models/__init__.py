"""One architecture a file: a frozen dataclass with pure methods."""
