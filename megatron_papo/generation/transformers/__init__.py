"""Generation with Hugging Face transformers: the engine for machines without a GPU, and its decode loop."""
