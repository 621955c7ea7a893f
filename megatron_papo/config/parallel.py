"""The section `parallel`: how the ranks share one copy of the model, and which exchanges overlap with computing."""

from __future__ import annotations

from pydantic import model_validator

from megatron_papo.config.basics import Count, Positive, Section


class ParallelConfig(Section):
    tensor: Count = 1
    """Tensor parallelism: ranks that share each layer. The ranks that remain are data-parallel."""
    pipeline: Count = 1
    """Pipeline parallelism: stages that share the layers; the vision tower is on the first stage."""
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel blocks are split over the tensor-parallel ranks."""
    pipeline_layers: list[Count] | None = None
    """Language-model layers of each pipeline stage; null: as even as possible, with fewer on the first stages."""
    distributed_optimizer: bool = False
    """Whether the states of the optimizer are split over the data-parallel ranks."""
    overlap_data: bool = False
    """Whether gradients are reduced while the backward pass goes on and, with the distributed optimizer, weights are
    gathered during the forward pass."""
    overlap_tensor: bool = False
    """Whether tensor-parallel ranks exchange values while linear layers compute (Transformer Engine's userbuffers).
    Needs a GPU, parallel.sequence and train.fixed_rows."""
    timeout_s: Positive = 1800.0
    """Seconds after which a collective operation between ranks fails."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor > 1")
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.pipeline:
            raise ValueError(
                f"parallel.pipeline_layers names {len(self.pipeline_layers)} stages, "
                f"parallel.pipeline is {self.pipeline}"
            )
        return self
