"""What the tests of checkpoints run: a tiny model with its optimizer, in any layout, and updates of it.

Gradients are an elementwise function of weights and step instead of a loss, so that any layout has the same ones;
they are clipped, so that layouts still differ by the rounding of the norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_papo.checkpoint.state import TrainState
from megatron_papo.config import Config, load_config
from megatron_papo.distributed.accelerator import adapt_megatron
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.transfer import hf_tensors, read_hf
from tests.support.tiny import make_tiny_folder

SHAPE = {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "vision_depth": 2, "vocab": 275, "tie": True}
VISION = {"vision_hidden": 32, "vision_heads": 4, "vision_intermediate": 42}
OPTIM = ["optim.lr=0.01", "optim.lr_vision=0.003", "optim.schedule=cosine", "optim.warmup_steps=2"]
Setup = dict[str, Any]


def ranks(world: int, tensor: int = 1, pipeline: int = 1, dtype: str = "float32", distributed: bool = False) -> Setup:
    return {"world": world, "tensor": tensor, "pipeline": pipeline, "dtype": dtype, "distributed": distributed}


def make_source(folder: Path, family: str = "qwen2_5_vl") -> Path:
    return make_tiny_folder(folder, family=family, **SHAPE, **VISION)


def start(source: str | Path, setup: Setup) -> TrainState:
    """A fresh run in a fresh process: the model of `source`, its optimizer, nothing trained."""
    return build(source, open_groups(setup))


def open_groups(setup: Setup) -> Config:
    """Starts the parallel groups of a fresh process; the settings of runs in it, for `build`."""
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    config = settings_of(setup)
    initialize(config.parallel)
    return config


def settings_of(setup: Setup, *overrides: str) -> Config:
    sizes = [f"parallel.tensor={setup['tensor']}", f"parallel.pipeline={setup['pipeline']}"]
    kind = [f"model.dtype={setup['dtype']}", f"parallel.distributed_optimizer={setup['distributed']}"]
    return load_config(None, [*sizes, *kind, *OPTIM, "model.spec=local", *overrides])


def build(source: str | Path, config: Config) -> TrainState:
    """As `start`, once the parallel groups exist."""
    from megatron_papo.distributed.accelerator import seed_all
    from megatron_papo.model.policy import build_policy
    from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy

    seed_all(7)
    shape = ModelShape.from_folder(source)
    model = build_policy(config, shape)
    read_hf(model, shape, source)
    policy = wrap_policy(model, config)
    return TrainState(policy, shape, build_optimizer(policy, config, num_updates=10), {"row": 5}, {"run": "test"})


def train(run: TrainState, steps: range) -> list[float]:
    """Updates, and what a run would log of them: gradient norm, learning rate and a draw of random numbers."""
    assert run.optimizer is not None
    logged = []
    for step in steps:
        run.model.zero_grad_buffer()
        for parameter in run.model.parameters():
            parameter.main_grad.copy_(parameter.detach().float() * torch.cos(40 * parameter.detach().float() + step))
        values = run.optimizer.step()
        logged += [values["grad_norm"], values["lr"], torch.rand(()).item()]
    return logged


def weights(run: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in hf_tensors(run.model, run.shape)}
