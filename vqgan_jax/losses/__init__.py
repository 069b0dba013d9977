"""Loss functions: arrays in, scalars out, each with its equation and source."""
