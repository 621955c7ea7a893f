"""The switch of FP8 for a model: which passes run in FP8, whether the GPU can compute the recipe.

Parameters stay in model.dtype and only products are taken in FP8, so FP8 can go on and off between passes. Under
Transformer Engine the switch is `TransformerConfig.fp8`, which Megatron-Core reads at every forward; under the local
spec it is a flag of the linear layers that emulate FP8. All ranks turn the switch at the same places. Left out:
parameters stored in FP8.
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
    """The linear layers of a model that compute in FP8, and whether they do so in the current pass."""

    def __init__(self, settings: Fp8Config):
        self.settings = settings
        self.allowed = settings.enabled
        """False for the rest of the run once it has been turned off."""
        self.on = False
        """Whether the current pass runs in FP8."""
        self.linears: dict[str, nn.Module] = {}
        """The linear layers that compute in FP8 when it is on, by a name such as `language.3.fc1`; layers count from
        0."""
        self._configs: list[tuple[TransformerConfig, Any]] = []
        self._group: dist.ProcessGroup | None = None

    @property
    def recipe(self) -> str:
        """The recipe of the current pass; `off` where it runs without FP8."""
        return self.settings.recipe if self.on else "off"

    def take(self, name: str, layers: Iterable[Any], config: TransformerConfig, *, skip: frozenset[int]) -> None:
        """Puts the linear layers of these transformer layers of this stage under the switch, except of layers in
        `skip`."""
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
        """A context for a pass that only scores: in FP8 where `fp8.score` says so."""
        return self.during(self.settings.score)

    def updating(self) -> Any:
        """A context for forward and backward of an update: in FP8 where `fp8.update` says so."""
        return self.during(self.settings.update)

    @contextmanager
    def during(self, wanted: bool) -> Iterator[None]:
        """A context in which passes run in FP8 if `wanted`, unless `turn_off` has been called."""
        before = self.on
        self._turn(wanted and self.allowed)
        try:
            yield
        finally:
            self._turn(before)

    def turn_off(self) -> None:
        """Ends FP8 for the rest of the run."""
        self.allowed = False
        self._turn(False)

    def after_forward(self, hidden: Tensor) -> None:
        """The language model calls this at the end of its part of a micro-batch's forward; `hidden` is its output.

        Emulated `delayed` updates its scales as Transformer Engine does: those of inputs and weights with every forward
        that a backward follows, those of gradients before the backward, from what the backward before it saw.
        """
        if self.on and torch.is_grad_enabled() and self._histories("input"):
            self._move_on("input", "weight")
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._move_on("gradient"))

    def settle(self) -> None:
        """Updates the scales of `delayed` from a pass that only scored, so that no update begins with scales of 1."""
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
        """The linear layers that emulate FP8."""
        for linear in self.linears.values():
            if isinstance(linear, RoundedColumnLinear | RoundedRowLinear):
                yield linear

    def _histories(self, *roles: Role) -> list[AmaxHistory]:
        operands = [linear.operands for linear in self.rounded() if linear.operands is not None]
        return [each.histories[role] for each in operands for role in roles if role in each.histories]

    def _move_on(self, *roles: Role) -> None:
        """Updates the scales of these operands from their maxima over the tensor ranks, which hold parts of one matrix.

        The maxima are not taken over data-parallel ranks: these may have unequal numbers of micro-batches and would
        wait for one another.
        """
        histories = self._histories(*roles)
        pending = torch.stack([history.pending for history in histories])
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(pending, op=dist.ReduceOp.MAX, group=self._group)
        for history, amax in zip(histories, pending):
            history.pending = amax
            history.move_on()


def check_hardware(config: Config, spec: str) -> None:
    """Raises ConfigError for a recipe that this rank's GPU, or the emulation under the spec `local`, cannot compute.

    Where the recipe is `blockwise`, also sets Transformer Engine's kind of scales (`use_float_scales`).
    """
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
    """Why a GPU of this compute capability, with this version of CUDA, cannot compute `recipe`; empty where it can."""
    name, actual = f"{recipe} needs", f", this is compute capability {major}.{minor} with CUDA {cuda}"
    if (major, minor) < (8, 9):
        return f"{name} FP8 tensor cores (compute capability 8.9 or higher){actual}"
    if recipe == "mxfp8" and major not in (10, 11):
        return f"{name} Blackwell (compute capability 10){actual}; on Hopper take tensorwise or blockwise"
    if recipe == "blockwise" and (major != 9 or tuple(map(int, cuda.split(".")[:2])) < (12, 9)):
        return f"{name} Hopper (compute capability 9.0) and CUDA 12.9 or higher{actual}; take tensorwise"
    return ""


def use_float_scales() -> None:
    """Makes Transformer Engine scale blocks in float32; scales of powers of two cost up to a bit of every block's
    range.

    Hopper's products take both kinds. Transformer Engine reads NVTE_FP8_BLOCK_SCALING_FP32_SCALES while it is imported.
    Megatron-Core imports it long before the settings are known, so this function replaces what was read.
    """
    from transformer_engine.common.recipe import Float8BlockScaling, QParams

    Float8BlockScaling.use_f32_scales = True
    for operand in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(Float8BlockScaling, operand, QParams(power_2_scale=False))
