"""What finished runs add up to: scaling laws with intervals, their tables and figures."""
