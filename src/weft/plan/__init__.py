"""Answers before anything is trained: which rank, where, and which learning rate."""
