"""Imported once by the fork server of `tests/ranks.py`: everything slow that a rank needs."""

import warnings

warnings.filterwarnings("ignore")

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402
import megatron.core.transformer.transformer_block  # noqa: E402,F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: E402,F401

import megatron_papo.checkpoint.huggingface  # noqa: E402
import megatron_papo.model.policy  # noqa: E402
import megatron_papo.optim  # noqa: E402,F401
