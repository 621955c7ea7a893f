"""The policy's optimizer: Megatron's data-parallel wrapper, its (distributed) Adam, learning rates of parts, schedule.

Gradients are sums, not means: every micro-batch's loss contains each token's share in the global mean
(`MicroBatch.weights_R`), so gradients are summed over micro-batches and data-parallel ranks and never divided again.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.transformer import MegatronModule
from megatron.core.utils import get_model_config

from megatron_papo.config import Config, ConfigError, OptimConfig
from megatron_papo.distributed.accelerator import has_gpu, host_threads, parameter_dtype
from megatron_papo.distributed.exchange import share_of_cores
from megatron_papo.model.vision_tower import in_projector
from megatron_papo.optimization.gradient_guard import UpdateGuard
from megatron_papo.optimization.gradient_norm import clip_gradients, gradient_norm, members


@dataclass(frozen=True)
class Optimizer:
    """Megatron's optimizer with its schedule and its guard."""

    policy: DistributedDataParallel
    """The model with its gradient buffers; a backward pass through it accumulates gradients there."""
    megatron: MegatronOptimizer
    schedule: OptimizerParamScheduler
    guard: UpdateGuard
    clip_grad: float
    """The largest norm of the gradients; 0: no clipping."""
    num_host_threads: int | None = None
    """Threads of an Adam whose states are on the host; everything else on the host uses the one thread of a rank."""

    def zero_grad(self) -> None:
        """Empties the gradient buffers."""
        self.policy.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, fault: str = "") -> dict[str, float]:
        """Clips the gradients in the buffers and makes one update; `grad_norm` (before clipping), `lr` and `skipped`.

        An update that the guard skips, as it does where there is a `fault`, changes neither weights nor moments; the
        schedule moves on all the same. Every rank passes the same `fault`.
        """
        self.megatron.prepare_grads()
        grad_norm = gradient_norm(self.megatron)
        skipped = self.guard.skips(grad_norm, fault)
        if not skipped:
            clip_gradients(self.megatron, grad_norm, self.clip_grad)
            with host_threads(self.num_host_threads) if self.num_host_threads else nullcontext():
                self.megatron.step_with_ready_grads()
        values = {
            "grad_norm": grad_norm,
            "lr": float(get_canonical_lr_for_logging(self.megatron.param_groups) or 0.0),
            "skipped": float(skipped),
        }
        self.schedule.step(increment=1)
        return values


def wrap_policy(model: MegatronModule, config: Config) -> DistributedDataParallel:
    """The model of this pipeline stage with fp32 gradient buffers, which are summed over the data-parallel ranks."""
    transformer = get_model_config(model)
    transformer.calculate_per_token_loss = True  # Megatron's switch for "sum, do not average"
    transformer.finalize_model_grads_func = _finalize_summed_grads
    overlap = config.parallel.overlap_data
    return DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and config.parallel.distributed_optimizer,
            check_for_nan_in_grad=False,  # `UpdateGuard` skips such an update; here it would end the run
        ),
        model,
    )


def _finalize_summed_grads(model: list[Any], num_tokens: torch.Tensor | None = None, **groups: Any) -> None:
    """Megatron's reduction over data-parallel, sequence-parallel and embedding ranks, not divided."""
    del num_tokens
    finalize_model_grads(model, None, **groups)


def build_optimizer(policy: DistributedDataParallel, config: Config, num_updates: int) -> Optimizer:
    """Adam over the trainable parameters of `policy`, with a schedule over `num_updates` updates; collective."""
    optim, dtype = config.optim, parameter_dtype(config.model.dtype)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_fraction,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_data and config.parallel.distributed_optimizer,
        **_state_placement(optim),
    )
    megatron = get_megatron_optimizer(settings, [policy], config_overrides=_overrides(optim))
    if has_gpu():
        _fuse(megatron)
    schedule = build_schedule(megatron, optim, num_updates)
    num_host_threads = share_of_cores() if optim.offload_fraction else None
    return Optimizer(policy, megatron, schedule, UpdateGuard(optim), optim.clip_grad, num_host_threads)


def build_schedule(megatron: MegatronOptimizer, optim: OptimConfig, num_updates: int) -> OptimizerParamScheduler:
    """Learning rates over `num_updates` updates, as `optim.schedule` says, set for the first update.

    Megatron's warm-up begins at a rate of zero, and its decay ends at the least rate, zero by default. Both ends lie
    outside the run: the first update is step 1 of the schedule, and the decay is one step longer than the run.
    """
    warm_up = optim.warmup_steps
    schedule = OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_fraction,
        lr_warmup_steps=warm_up,
        lr_decay_steps=max(num_updates, warm_up) + 1 if warm_up else num_updates,
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    if warm_up:
        schedule.step(increment=1)
    return schedule


def _state_placement(optim: OptimConfig) -> dict[str, Any]:
    """Megatron's settings for moments in bfloat16 beside fp32 master weights, and for a share of both,
    and of the update, on the host."""
    settings: dict[str, Any] = {}
    if (optim.precision_aware or optim.offload_fraction) and not has_gpu():
        raise ConfigError("optim.precision_aware and optim.offload_fraction need a GPU: there is none on this rank")
    if optim.precision_aware:
        settings |= {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
        settings |= {"store_param_remainders": False}  # master copies whole, as a checkpoint holds them
    if optim.offload_fraction:
        settings |= {"optimizer_cpu_offload": True, "optimizer_offload_fraction": optim.offload_fraction}
        settings |= {"overlap_cpu_optimizer_d2h_h2d": True, "use_torch_optimizer_for_cpu_offload": not HAVE_TE}
    return settings | ({"use_precision_aware_optimizer": True} if settings else {})


def _fuse(megatron: MegatronOptimizer) -> None:
    """Makes torch's AdamW, which Megatron takes where Transformer Engine is not installed, one fused kernel.

    By default it makes temporaries as large as one of its states, several at a time (14 GiB for 3B). The fused one
    counts its steps on the GPU. An Adam with states on the host is fused by Megatron already.
    """
    for adam in (member.optimizer for member in members(megatron)):
        if isinstance(adam, torch.optim.Adam):
            for group in adam.param_groups:
                group["fused"] = True


def _overrides(optim: OptimConfig) -> dict[ParamKey, dict[str, float]]:
    """No weight decay for biases and norms; learning rates of their own for the vision tower and the projector."""
    no_decay = ParamWithNamePredicate("no_decay", lambda param, name: param.dim() == 1 or name.endswith(".bias"))
    overrides: dict[ParamKey, dict[str, float]] = {ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0}}
    projector = ParamWithNamePredicate("projector", lambda _, name: "vision." in name and in_projector(name))
    tower = ParamWithNamePredicate("tower", lambda _, name: "vision." in name and not in_projector(name))
    for rate, predicate in ((optim.lr_projector, projector), (optim.lr_vision, tower)):
        if rate is not None:
            rates = {"max_lr": rate, "min_lr": rate * optim.min_lr_fraction}
            overrides[ParamKey(with_name_predicate=predicate)] = rates
    return overrides
