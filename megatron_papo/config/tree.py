"""The whole tree of settings, and what its sections say of each other.

Settings never change after they were loaded. Layout against model shape (heads, layers, vocabulary) is checked by
`model.shape.check_layout`, from the model's `config.json`.
"""

from __future__ import annotations

from pydantic import model_validator

from megatron_papo.config.basics import Section
from megatron_papo.config.certify import CertifyConfig
from megatron_papo.config.checkpoint import CheckpointConfig
from megatron_papo.config.cluster import ClusterConfig
from megatron_papo.config.data import DataConfig
from megatron_papo.config.eval import EvalConfig
from megatron_papo.config.fp8 import Fp8Config
from megatron_papo.config.generation import GenerationConfig
from megatron_papo.config.loss import EntropyConfig, LossConfig
from megatron_papo.config.model import ModelConfig
from megatron_papo.config.observe import ObserveConfig
from megatron_papo.config.optim import OptimConfig
from megatron_papo.config.parallel import ParallelConfig
from megatron_papo.config.perception import PerceptionConfig
from megatron_papo.config.reward import RewardConfig
from megatron_papo.config.run import RunConfig
from megatron_papo.config.training import SftConfig, TrainConfig


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    perception: PerceptionConfig = PerceptionConfig()
    entropy: EntropyConfig = EntropyConfig()
    optim: OptimConfig = OptimConfig()
    fp8: Fp8Config = Fp8Config()
    certify: CertifyConfig = CertifyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def reads_masked_view(self) -> bool:
        """Whether a term of the loss reads the masked images: plain GRPO and DAPO do not pay for them."""
        coefs = (self.loss.perception_coef, self.loss.masked_entropy_coef, self.perception.coef_end or 0.0)
        return any(coef > 0 for coef in coefs)

    @property
    def reads_joint_rows(self) -> bool:
        """Whether both views go through the model in one row, with gradient through both."""
        return self.reads_masked_view and self.perception.masked_branch == "joint"

    def warnings(self) -> list[str]:
        """Settings that are allowed and doubtful, each with its reason: without effect, or likely to end a run."""
        doubts = []
        frozen = self.perception.masked_branch == "frozen"
        if frozen and self.loss.masked_entropy_coef > 0:
            doubts.append(
                "loss.masked_entropy_coef has no gradient with perception.masked_branch=frozen: "
                "the masked log-probs are constants; use joint"
            )
        if self.perception.guard.action != "off" and not self.reads_masked_view:
            doubts.append("perception.guard watches a term whose coefficient loss.perception_coef is 0")
        if self.train.ahead and self.loss.correction == "none" and self.loss.old_logprobs == "recomputed":
            doubts.append(
                "train.ahead: rollouts are one step old, which no term of the loss sees with loss.correction=none; "
                "use truncated"
            )
        longest = self.data.max_prompt_tokens + self.generation.max_response_tokens
        needed = longest * (2 if self.reads_joint_rows else 1)
        if self.train.tokens_per_micro_batch < needed:
            views = " in two views" if self.reads_joint_rows else ""
            doubts.append(
                f"train.tokens_per_micro_batch={self.train.tokens_per_micro_batch} is less than the {needed} tokens of "
                f"the longest sequence{views} (data.max_prompt_tokens + generation.max_response_tokens = {longest}): "
                "a longer sequence gets a row of up to twice the budget, and beyond that its prompt is a bad row"
            )
        return doubts

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.run.offline and self.observe.wandb == "online":
            raise ValueError(
                "observe.wandb=online needs a network, and run.offline=true says there is none: use offline"
            )
        if self.perception.kl == "full" and self.perception.masked_branch == "frozen":
            raise ValueError("perception.kl=full needs perception.masked_branch=joint: a frozen branch keeps no logits")
        self._check_ahead()
        if self.train.epochs is not None or self.sft.epochs is not None:
            key = "train" if self.train.epochs is not None else "sft"
            if any(stage.steps is not None for stage in self.data.curriculum):
                raise ValueError(
                    f"{key}.epochs: a stage of data.curriculum lasts steps; give its epochs, or {key}.steps"
                )
        self._check_gpu_path()
        overlong, limit = self.reward.overlong, self.generation.max_response_tokens
        if overlong.enabled and overlong.buffer > limit:
            raise ValueError(
                f"reward.overlong.buffer: {overlong.buffer} exceeds generation.max_response_tokens={limit}"
            )
        return self

    def _check_ahead(self) -> None:
        if not self.train.ahead:
            return
        if self.generation.placement != "separate":
            raise ValueError(
                "train.ahead needs generation.placement=separate: a colocated engine waits for the trainer"
            )
        if self.train.dynamic_sampling.enabled:
            raise ValueError("train.ahead: train.dynamic_sampling does not know beforehand how much it will ask for")

    def _check_gpu_path(self) -> None:
        parallel, model = self.parallel, self.model
        for key in ("precision_aware", "offload_fraction"):
            if getattr(self.optim, key) and not parallel.distributed_optimizer:
                raise ValueError(f"optim.{key} needs parallel.distributed_optimizer=true")
        if self.optim.offload_fraction and model.dtype == "float32":
            raise ValueError("optim.offload_fraction needs model.dtype=bfloat16: Megatron-Core offloads no float32")
        fixed = {"parallel.overlap_tensor": parallel.overlap_tensor, "model.cuda_graphs": model.cuda_graphs}
        for key, asked in fixed.items():
            if asked and not self.train.fixed_rows:
                raise ValueError(f"{key} needs train.fixed_rows=true: its buffers have one size")
            if asked and model.spec == "local":
                raise ValueError(f"{key} needs model.spec=transformer_engine")
        if model.cuda_graphs and model.recompute != "none":
            raise ValueError(f"model.cuda_graphs captures the MLP that model.recompute={model.recompute} changes")
        if parallel.overlap_tensor and not parallel.sequence:
            raise ValueError("parallel.overlap_tensor needs parallel.sequence=true")
