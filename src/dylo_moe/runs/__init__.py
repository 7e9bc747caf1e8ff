"""What the commands share: setting up, running and resuming a training run or a benchmark."""
