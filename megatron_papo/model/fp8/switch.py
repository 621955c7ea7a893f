"""Which passes run in FP8: one switch a model, over Transformer Engine's layers and over the emulation alike.

Parameters stay in model.dtype; only products are taken in FP8, so it goes on and off between passes. Under Transformer
Engine the switch is `TransformerConfig.fp8`, which Megatron-Core reads at every forward; under the local spec it is a
flag of the rounded linears. All ranks turn it alike. Left out: parameters kept in FP8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_papo.config import Config, ConfigError, Fp8Config
from megatron_papo.distributed.accelerator import device
from megatron_papo.model.fp8.linear import RoundedColumnLinear, RoundedLinear, RoundedRowLinear
from megatron_papo.model.fp8.rounding import AmaxHistory, Operands, Role


class Fp8Switch:
    def __init__(self, settings: Fp8Config):
        self.settings = settings
        self.allowed = settings.enabled
        """False for the rest of the run once it has been turned off."""
        self.on = False
        """In the pass that is under way."""
        self.linears: dict[str, nn.Module] = {}
        """Those that compute in FP8 when it is on, by a name such as `language.3.fc1`; the layer from 0."""
        self._configs: list[tuple[TransformerConfig, Any]] = []
        self._group: dist.ProcessGroup | None = None

    @property
    def recipe(self) -> str:
        """Of the pass that is under way."""
        return self.settings.recipe if self.on else "off"

    def take(self, name: str, layers: Iterable[Any], config: TransformerConfig, *, skip: frozenset[int]) -> None:
        """Puts the linears of these layers (Megatron's, of this stage) under the switch, those of `skip` left out."""
        if not self.settings.enabled:
            return
        self._configs.append((config, config.fp8))
        config.fp8 = None
        for layer in layers:
            place = layer.layer_number - 1  # Megatron counts from 1, over all stages
            if place in skip:
                continue
            attention, mlp = layer.self_attention, layer.mlp
            parts = {"qkv": attention.linear_qkv, "proj": attention.linear_proj}
            for part, linear in (parts | {"fc1": mlp.linear_fc1, "fc2": mlp.linear_fc2}).items():
                self.linears[f"{name}.{place}.{part}"] = linear
                if isinstance(linear, RoundedColumnLinear | RoundedRowLinear):
                    linear.operands = Operands(self.settings.recipe, self.settings.amax_history, device())
                    self._group = linear.tp_group

    def scoring(self) -> Any:
        """Context of a pass that only scores."""
        return self.during(self.settings.score)

    def updating(self) -> Any:
        """Context of forward and backward of an update."""
        return self.during(self.settings.update)

    @contextmanager
    def during(self, wanted: bool) -> Iterator[None]:
        """Within the block passes run in FP8 if `wanted`, and if the run has not left FP8."""
        before = self.on
        self._turn(wanted and self.allowed)
        try:
            yield
        finally:
            self._turn(before)

    def turn_off(self) -> None:
        """For the rest of the run."""
        self.allowed = False
        self._turn(False)

    def after_forward(self, hidden: Tensor) -> None:
        """Told by the language model at the end of its part of a micro-batch's forward, `hidden` its output.

        Under emulated `delayed` the scales of inputs and weights move on with every forward that a backward follows,
        those of gradients before the backward, with what the one before it saw; as in Transformer Engine.
        """
        if self.on and torch.is_grad_enabled() and self._histories("input"):
            self._move_on("input", "weight")
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._move_on("gradient"))

    def settle(self) -> None:
        """After a pass that only scored: `delayed` scales follow what it saw, so that none begins at 1."""
        if self._histories("input"):
            self._move_on("input", "weight")
        elif self.settings.recipe == "delayed" and self.linears:
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)

    def _turn(self, on: bool) -> None:
        self.on = on
        for config, value in self._configs:
            config.fp8 = value if on else None
        for linear in self.rounded():
            linear.rounds = on

    def rounded(self) -> Iterator[RoundedLinear]:
        """The linears that are emulated."""
        for linear in self.linears.values():
            if isinstance(linear, RoundedColumnLinear | RoundedRowLinear):
                yield linear

    def _histories(self, *roles: Role) -> list[AmaxHistory]:
        operands = [linear.operands for linear in self.rounded() if linear.operands is not None]
        return [each.histories[role] for each in operands for role in roles if role in each.histories]

    def _move_on(self, *roles: Role) -> None:
        """With the maxima over the tensor ranks: they hold parts of one matrix. Not over data-parallel ranks, which may
        have unequal numbers of micro-batches and would wait for one another."""
        histories = self._histories(*roles)
        pending = torch.stack([history.pending for history in histories])
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(pending, op=dist.ReduceOp.MAX, group=self._group)
        for history, amax in zip(histories, pending):
            history.pending = amax
            history.move_on()


def check_hardware(config: Config, spec: str) -> None:
    """Raises ConfigError for a recipe that this rank's GPU cannot compute, or that `local`, the emulation, does not."""
    recipe, recompute = config.fp8.recipe, config.model.recompute
    if recipe == "delayed" and spec == "local" and recompute in ("mlp", "full"):
        raise ConfigError(
            f"model.recompute: {recompute} computes a layer again after the scales of an emulated fp8.recipe=delayed "
            "have moved on; take selective"
        )
    if recipe == "off" or spec == "local":
        return
    major, minor = torch.cuda.get_device_capability()
    fault = fault_of_device(recipe, major, minor, torch.version.cuda or "0.0")
    if fault:
        raise ConfigError(f"fp8.recipe: {fault}")
    if recipe == "blockwise":
        use_float_scales()


def fault_of_device(recipe: str, major: int, minor: int, cuda: str) -> str:
    """Why a GPU of this compute capability, with this CUDA, cannot; empty where it can."""
    name, here = f"{recipe} needs", f", this is compute capability {major}.{minor} with CUDA {cuda}"
    if (major, minor) < (8, 9):
        return f"{name} FP8 tensor cores (compute capability 8.9 or higher){here}"
    if recipe == "mxfp8" and major not in (10, 11):
        return f"{name} Blackwell (compute capability 10){here}; on Hopper take tensorwise or blockwise"
    if recipe == "blockwise" and (major != 9 or tuple(map(int, cuda.split(".")[:2])) < (12, 9)):
        return f"{name} Hopper (compute capability 9.0) and CUDA 12.9 or higher{here}; take tensorwise"
    return ""


def use_float_scales() -> None:
    """Scales of blocks in float32 instead of powers of two, which cost up to a bit of every block's range.

    Hopper's products take either. Transformer Engine reads NVTE_FP8_BLOCK_SCALING_FP32_SCALES while it is imported, and
    Megatron-Core has imported it long before the settings are known, so what it read is replaced here.
    """
    from transformer_engine.common.recipe import Float8BlockScaling, QParams

    Float8BlockScaling.use_f32_scales = True
    for operand in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(Float8BlockScaling, operand, QParams(power_2_scale=False))
