"""What everything else stands on: threat, model, data, randomness, statistics, errors."""
