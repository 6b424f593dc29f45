"""What everything else stands on: params, config, trees, keys, files. Knows nothing of models."""
