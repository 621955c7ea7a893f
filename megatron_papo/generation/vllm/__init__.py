"""Generation with vLLM inside the trainer's ranks: the engine, its start and end, its weights, and its memory."""
