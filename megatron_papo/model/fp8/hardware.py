"""What a recipe asks of the GPU, known on the ranks alone; and how Transformer Engine is told of Hopper's scales."""

from __future__ import annotations

import torch

from megatron_papo.config import Config, ConfigError


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
