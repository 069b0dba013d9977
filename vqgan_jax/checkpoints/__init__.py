"""Checkpoints of runs and exports, and the directories that they are in."""
