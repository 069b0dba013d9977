"""The training loop and what it is made of: states, steps, optimisers, sharding, checkpoints."""
