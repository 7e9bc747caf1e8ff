"""What a run reports while it trains: usage, balance, gradients and trackers."""
