"""Measurements: what this code does in a second, beside its peers."""
