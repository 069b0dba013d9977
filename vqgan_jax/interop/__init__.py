"""Other people's checkpoints to ours and back, one file a family."""
