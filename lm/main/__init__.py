"""The verbs of the command `lm`, one a file."""
