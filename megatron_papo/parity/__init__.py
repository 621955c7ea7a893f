"""The parity certificate: Hugging Face transformers, Megatron in this layout and the engine on the same prompts.

They are compared part by part, from token ids to log-probs; the first part that departs is named.
"""

from megatron_papo.parity.certifier import Certifier

__all__ = ["Certifier"]
