"""Base models: load one with its tokenizer, the usual sites of an architecture, the embedded base, attach."""
