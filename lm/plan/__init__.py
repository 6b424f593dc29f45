"""What a run needs, and how fast it should go, on hardware that is not there."""
