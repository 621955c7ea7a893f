"""vLLM on ranks of its own: the trainer's side (`remote_generator`), an engine's ranks, and what travels between them.

How they find each other, prove who they are and hand weights over: docs/separate.md.
"""
