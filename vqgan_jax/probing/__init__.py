"""Recognition: how well classes can be told from what a trained model has learned of images."""
