"""The section `parallel`: over how many ranks the model is split, and along which axes."""

from __future__ import annotations

from pydantic import model_validator

from megatron_papo.config.basics import Count, Positive, Section


class ParallelConfig(Section):
    tensor: Count = 1
    """Ranks that share each layer; data parallelism is what remains of the ranks."""
    pipeline: Count = 1
    """Stages that share the layers; the vision tower is on the first."""
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel blocks are split over the tensor ranks."""
    pipeline_layers: list[Count] | None = None
    """Language-model layers of each pipeline stage; by default as even as possible, first stages smaller."""
    distributed_optimizer: bool = False
    """Optimizer states split over the data-parallel ranks."""
    overlap_data: bool = False
    """Reduce gradients, and with the distributed optimizer gather weights, while the rest is computed."""
    overlap_tensor: bool = False
    """Exchange between tensor ranks while linear layers compute (Transformer Engine's userbuffers). Needs a GPU,
    parallel.sequence and train.fixed_rows."""
    timeout_s: Positive = 1800.0
    """A collective that takes longer fails."""

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
