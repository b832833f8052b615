"""Adapters in files: PEFT's, and those of others."""
