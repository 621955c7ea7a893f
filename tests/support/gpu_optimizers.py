"""Optimizers of a GPU machine on one without: a stand-in for Transformer Engine's Adam, and weights on a host's side.

`FusedAdam` counts and keeps its states as Transformer Engine's does; its arithmetic is plain torch. `a_host_beside_it`
lets Megatron's offloading optimizer, which takes weights on the CPU for its own, tell the host's copies from the GPU's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TE_VERSION = "2.20.2"
"""Whose `transformer_engine/pytorch/optimizers/fused_adam.py` the stand-in follows."""


class FusedAdam(torch.optim.Optimizer):
    """Step in the groups, moments and master copies in the states, `decoupled_grad` where it is asked for."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        assert adam_w_mode and not (amsgrad or capturable or set_grad_none), "not needed here"
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": master_weight_dtype}
        self.store_param_remainders = store_param_remainders and master_weights

    def initialize_state(self, param, store_param_remainders):
        assert not store_param_remainders, "master copies are whole"
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=self.dtypes[name])
        if self.master_weights:
            self.state[param]["master_param"] = param.detach().clone().to(self.dtypes["master_param"])

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, self.store_param_remainders and param.dtype == torch.bfloat16)
                grad = getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad
                if grad is not None:
                    self._update(param, grad, group)

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        first = state["exp_avg"].float().lerp(grad.float(), 1 - beta1)
        second = state["exp_avg_sq"].float().lerp(grad.float() ** 2, 1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        if group["bias_correction"]:
            first, second = first / (1 - beta1 ** group["step"]), second / (1 - beta2 ** group["step"])
        main = state["master_param"] if self.master_weights and param.dtype != torch.float32 else param
        update = first / (second.sqrt() + group["eps"]) + group["weight_decay"] * main
        main.sub_(group["lr"] * update)
        param.copy_(main)


@contextmanager
def transformer_engine() -> Iterator[None]:
    """The stand-in where Megatron-Core takes its Adam from; for as long as an optimizer is being built."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False, is_te_min_version=_any_version),
        mock.patch.object(distrib_optimizer, "Adam", FusedAdam),
        mock.patch.object(optimizer_config, "is_te_min_version", _any_version),
    ):
        yield


def _any_version(*_: Any) -> bool:
    return True


class HostTensor(Tensor):
    """What was copied to the host, and all that is made of it; every other tensor counts as the GPU's."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # in files it is a tensor like any other


@contextmanager
def a_host_beside_it() -> Iterator[None]:
    """For building and stepping of optimizers; after `adapt_megatron`."""
    with mock.patch.multiple(torch.cuda, Stream=mock.MagicMock(), current_stream=mock.MagicMock()), _TwoPlaces():
        yield


class _TwoPlaces(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not isinstance(args[0], HostTensor)
        if func is torch.Tensor.cpu:
            return args[0].clone().as_subclass(HostTensor)
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})
