"""Moves the weights of a model: from and to Hugging Face folders, and to the engine, a bucket at a time."""
