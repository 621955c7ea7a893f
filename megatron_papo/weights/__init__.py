"""The weights of a model on their way: from and to Hugging Face folders, and to the engine, a bucket at a time."""
