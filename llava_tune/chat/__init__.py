"""Talking to a model: our checkpoints, exports and other LLaVA of transformers, in the terminal and on a page."""
