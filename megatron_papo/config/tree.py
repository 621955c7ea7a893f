"""The tree of settings, section by section, and what its sections say of each other.

Settings never change after they were loaded. Layout against model shape (heads, layers, vocabulary) is checked by
`model.shape.check_layout`, from the model's `config.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Fraction, NoAsOff, NonNegative, Positive, Section
from megatron_papo.config.certify import CertifyConfig
from megatron_papo.config.cluster import ClusterConfig
from megatron_papo.config.fp8 import Fp8Config
from megatron_papo.config.generation import GenerationConfig


class RunConfig(Section):
    name: str = "papo"
    """Shown in the sinks."""
    dir: Path = Path("runs/papo")
    """Everything a run writes lies under this folder."""
    seed: int = 0
    """Of the data order, sampling, masks and random weights."""
    stall_limit_s: Positive = 1800.0
    """A stage that makes no progress for this long dumps every rank's Python stack and stops the run; between stages
    too."""
    stage_limits_s: dict[str, Positive] = {}
    """Limits of single stages instead, e.g. `{generate: 3600, save: 600}`; names as in the metrics `time/<stage>`, of a
    stage within another the last part."""
    heartbeat_s: Positive = 5.0
    """Every rank writes a sign of life under run.dir/heartbeats this often, and looks whether another has failed."""
    heartbeat_limit_s: Positive = 60.0
    """A rank whose sign of life is older is taken for dead: the supervisor of a cluster job ends the attempt."""
    max_failures: Count = 3
    """Attempts in a row that may fail at the same step before a cluster job stops with the reason."""


class FreezeConfig(Section):
    vision: bool = False
    """The vision tower without its projector gets no gradient."""
    projector: bool = False
    """The patch merger that ends the vision tower."""
    language: bool = False
    """The language model with embedding and head."""


class ModelConfig(Section):
    path: Path | None = None
    """A Hugging Face folder: config.json, tokenizer, processor, and model.safetensors or the files of its index."""
    checkpoint: Path | None = None
    """A Megatron checkpoint folder to start from instead of the weights of `path`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters; `auto` is bfloat16 on a GPU and float32 without one."""
    spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer specs; `auto` takes Transformer Engine when it is installed and a GPU is there."""
    freeze: FreezeConfig = FreezeConfig()
    recompute: Literal["none", "selective", "mlp", "full"] = "none"
    """Activations computed again in backward: none; selective: what costs no product of matrices, norms' outputs and
    SwiGLU's; mlp: the output of the MLP's first linear too; full: whole layers."""
    cuda_graphs: bool = False
    """Capture each layer's MLP as a CUDA graph. Needs a GPU, the spec transformer_engine and train.fixed_rows."""
    random_init: bool = False
    """Start from random weights of the shape in `path`/config.json."""


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


class ColumnsConfig(Section):
    problem: str = "problem"
    """Column of the question: text, or one turn of the user."""
    answer: str = "answer"
    """Column of the right answer, or of a list of them, any of which counts."""
    images: str | None = "images"
    """Column of one image or several: bytes, paths, base64 or pictures; null: the text alone is read."""


MOST_IMAGE_PIXELS = 89_000_000
"""A little less than what Pillow takes for an attack."""


class DataConfig(Section):
    train: str | None = None
    """A file (parquet, jsonl), a pattern of files, an image folder or a hub name: anything `datasets` reads."""
    eval: str | None = None
    """The held-out set, likewise."""
    split: str = "train"
    """Split of data.train."""
    eval_split: str | None = None
    """Of data.eval; null: the same name."""
    preset: Literal["none", "virl39k", "geometry3k"] = "none"
    """Layouts of published data sets; replaces data.columns."""
    columns: ColumnsConfig = ColumnsConfig()
    instruction: str = (
        "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> "
        "tags. Then, provide your final answer enclosed within \\boxed{}."
    )
    """Follows the question in the user's turn, after a blank line; empty means the question alone."""
    system: str | None = None
    """The system turn; null: the chat template's own."""
    min_pixels: Count | None = None
    """Smaller images are enlarged to this area; null: to that of the model folder's own image processor."""
    max_pixels: Count | None = None
    """Larger images are reduced to this area; null likewise. Published processors allow areas of 16,384 tokens: mind
    data.max_prompt_tokens."""
    max_image_pixels: Annotated[int, Field(ge=1, le=MOST_IMAGE_PIXELS)] = 2**25
    """An image of more pixels is a bad row: it is not decoded, which takes some 12 bytes of memory a pixel."""
    image_roots: list[Path] = []
    """Further folders in which images named by path may lie; by default the data set's own folder alone."""
    max_prompt_tokens: Count = 4096
    """A longer prompt is a bad row."""
    on_bad_row: Literal["skip", "stop"] = "stop"
    """Corrupt image, wrong placeholder count, no answer, too long and the like: leave it out, or stop and name it."""
    shuffle: bool = True
    """A new order each epoch; false: the order of the file."""
    prefetch: bool = True
    """`papo train` prepares the next prompts in a thread while it trains on these: host memory for one draw more."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels={self.min_pixels} exceeds data.max_pixels={self.max_pixels}")
        if self.preset != "none" and self.columns != ColumnsConfig():
            raise ValueError(f"data.columns: data.preset={self.preset} names the columns; give one of the two")
        return self


class MaskConfig(Section):
    """Which perturbation makes the masked image."""

    kind: Literal["cells", "blur", "noise", "swap", "crop"] = "cells"
    """Black cells (the paper), or another way to spoil the image."""
    ratio: Fraction = 0.6
    """Probability that a cell goes black."""
    cell: Count | None = None
    """Edge of a cell in pixels; null: of a patch of the model folder's image processor, 14 for Qwen2.5-VL."""
    align: Literal["raw", "patches"] = "raw"
    """`raw`: cells on the image as loaded (the paper); `patches`: on the resized image, a cell a merged patch."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if self.align == "patches" and self.kind != "cells":
            raise ValueError(f"perception.mask.align=patches works with kind=cells, not {self.kind}")
        return self


class GuardConfig(Section):
    """Watches for collapse of the perception term and acts before reward falls."""

    action: Annotated[Literal["off", "lower", "stop"], NoAsOff] = "off"
    """What to do: nothing, lower the coefficient, or save and stop."""
    perception_kl: Positive = 1.0
    """Sign: mean perception KL above this, nats a token."""
    clip_fraction: Positive = 0.007
    """Sign: fraction of tokens whose ratio is clipped, of advantages of either sign, above this."""
    masked_entropy: Positive = 1.1
    """Sign: entropy with the image masked above this, nats a token."""
    patience: Count = 3
    """Steps in a row with a sign before acting."""
    factor: Fraction = 0.5
    """`lower` multiplies the perception coefficient by this, and leaves the entropy terms, which counter collapse."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, tree: Any) -> Any:
        """Runs of before have written all settings into their config.yaml: what is at its default there is no wish."""
        if not isinstance(tree, dict) or "clip_high_fraction" not in tree:
            return tree
        if tree["clip_high_fraction"] != 0.007:
            raise ValueError(
                "clip_high_fraction, of positive advantages alone, is now clip_fraction, of advantages of either sign: "
                "set that"
            )
        return {key: value for key, value in tree.items() if key != "clip_high_fraction"}


class PerceptionConfig(Section):
    masked_branch: Literal["frozen", "joint"] = "frozen"
    """`frozen`: masked log-probs scored once per rollout batch, no gradient; `joint`: gradient through both views."""
    kl: Literal["k3", "full"] = "k3"
    """The one-sample estimate, or the exact KL over the vocabulary (joint only)."""
    mask: MaskConfig = MaskConfig()
    clamp: Positive | None = None
    """Upper bound of the per-token perception KL in the loss (0.2 counters collapse); None keeps k3's own +-10."""
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The term reads only this fraction of each response's tokens: those of highest KL."""
    coef_end: NonNegative | None = None
    """Linear schedule of loss.perception_coef to this value over `coef_steps`. Both entropy coefficients follow it as
    in the reference code: they are multiplied by the coefficient's share of the larger of its two ends."""
    coef_steps: Count | None = None
    """Steps of that schedule."""
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _check(self) -> PerceptionConfig:
        if (self.coef_end is None) != (self.coef_steps is None):
            raise ValueError("perception.coef_end and perception.coef_steps go together")
        return self


class EntropyConfig(Section):
    kind: Literal["sampled", "full"] = "sampled"
    """-log-prob of the sampled tokens, or over the whole vocabulary with its gradient."""


class LossConfig(Section):
    policy_loss: Literal["clipped"] = "clipped"
    """The policy term: `clipped`, the clipped ratio of PPO and GRPO, with a dual clip."""
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """epsilon below: the ratio is clipped at 1 - this."""
    clip_high: Positive = 0.3
    """epsilon above: the ratio is clipped at 1 + this."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = 3.0
    """c: for negative advantages the loss is at most -c times the advantage; null: no bound."""
    averaging: Literal["token", "sequence", "fixed"] = "token"
    """Mean over the tokens, over the sequences of token means, or a sum over a fixed number."""
    fixed_denominator: Positive | None = None
    """Tokens that `averaging: fixed` divides by, e.g. global batch x generation.max_response_tokens."""
    perception_coef: NonNegative = 0.02
    """gamma: weight of the perception KL, which is maximised."""
    reference_coef: NonNegative = 0.01
    """beta: weight of the KL to the reference policy; 0: no reference is kept."""
    entropy_coef: NonNegative = 0.0
    """eta 1: weight of the entropy with the image, which is minimised."""
    masked_entropy_coef: NonNegative = 0.0
    """eta 2: weight of the entropy with the image masked, which is minimised."""
    old_logprobs: Literal["recomputed", "rollout"] = "recomputed"
    """What the ratio is taken against: the trainer's own log-probs of the weights before the updates, or the engine's
    as it sampled."""
    correction: Literal["none", "truncated", "masked"] = "none"
    """Importance sampling for what the engine's log-probs differ from the recomputed ones: the policy term times their
    ratio, cut at correction_cap; or times the ratio, and zero where it lies outside correction_floor to the cap."""
    correction_level: Literal["token", "sequence"] = "token"
    """Whether that ratio is a token's, or a whole response's: the geometric mean of its tokens'."""
    correction_cap: Annotated[float, Field(ge=1.0)] = 2.0
    """Largest ratio."""
    correction_floor: Fraction = 0.5
    """Smallest ratio of `masked`."""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if (self.averaging == "fixed") != (self.fixed_denominator is not None):
            raise ValueError("loss.averaging=fixed and loss.fixed_denominator go together")
        if self.correction != "none" and self.old_logprobs == "rollout":
            raise ValueError("loss.correction needs loss.old_logprobs=recomputed: it corrects for the engine's")
        return self


class DynamicSamplingConfig(Section):
    enabled: bool = False
    """DAPO's: train only on prompts whose rollouts disagree, and generate until there are enough."""
    low: Fraction = 0.01
    """Mean accuracy must be above this."""
    high: Fraction = 0.99
    """Mean accuracy must be below this."""
    prompts_per_round: Count | None = None
    """Prompts that are drawn at a time, over all ranks; null: train.prompts_per_step."""
    max_rounds: Count = 20
    """Rounds of a step before giving up."""
    when_none_kept: Literal["drop", "keep"] = "drop"
    """A round of which no prompt would be kept: drop it as any other, or keep all of it (PAPO's reference code)."""


class OverlongConfig(Section):
    """DAPO's soft overlong punishment: from 0 to -penalty over the last `buffer` tokens before the limit."""

    enabled: bool = False
    """Whether long answers are punished."""
    buffer: Count = 512
    """Tokens before generation.max_response_tokens over which the penalty grows."""
    penalty: NonNegative = 1.0
    """At the limit."""


class RewardConfig(Section):
    accuracy_weight: NonNegative = 0.9
    """Weight of a right answer in the box."""
    format_weight: NonNegative = 0.1
    """Weight of a think block followed by a box."""
    accuracy: Literal["math", "mathruler", "exact", "anls"] = "math"
    """Equal as mathematics, by the grader of the paper's code, equal as text, or ANLS similarity."""
    repetition_weight: NonNegative = 0.0
    """Subtracted: weight x fraction of repeated n-grams."""
    repetition_ngram: Count = 4
    """Words of an n-gram."""
    function: str | None = None
    """`module:function(response: str, answer: str, problem: str) -> float`, replaces the accuracy part. `response`
    begins with the think block that the chat template opens, where it does."""
    timeout_s: Positive = 2.0
    """Processor time. An answer that takes longer to compare is wrong."""
    overlong: OverlongConfig = OverlongConfig()


class TrainConfig(Section):
    steps: Count = 202
    """Rollout batches of the whole run."""
    prompts_per_step: Count = 384
    """Over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Rollouts of a prompt."""
    updates_per_step: Count = 3
    """Optimizer steps of one rollout batch; prompts_per_step must divide by it."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    tokens_per_micro_batch: Count = 16_384
    """Budget of a packed row: each prompt once with its responses, and once more for the masked view of a joint row."""
    ahead: bool = False
    """Generate the rollouts of the next step while this one trains, with weights one update old. Needs
    generation.placement=separate."""
    fixed_rows: bool = False
    """Pad every row to tokens_per_micro_batch: what CUDA graphs and overlapped tensor-parallel exchanges need."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """0: only after the last step, when data.eval is set."""
    eval_at_start: bool = False
    """Evaluate the starting weights too, before the first step, when data.eval is set."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"train.prompts_per_step={self.prompts_per_step} does not divide by "
                f"train.updates_per_step={self.updates_per_step}"
            )
        dynamic, most = self.dynamic_sampling, self.dynamic_sampling.max_rounds * self.prompts_per_round
        if dynamic.enabled and most < self.prompts_per_step:
            raise ValueError(
                f"train.dynamic_sampling: max_rounds={dynamic.max_rounds} rounds of {self.prompts_per_round} prompts "
                f"are fewer than train.prompts_per_step={self.prompts_per_step}"
            )
        return self

    @property
    def prompts_per_round(self) -> int:
        """Drawn and generated at a time, over all ranks: a whole step's but under dynamic sampling."""
        dynamic = self.dynamic_sampling
        return (dynamic.prompts_per_round if dynamic.enabled else None) or self.prompts_per_step


class SftConfig(Section):
    steps: Count = 100
    """Optimizer steps."""
    batch_size: Count = 64
    """Rows of an optimizer step, over all data-parallel ranks."""
    response_column: str = "response"
    """Column of the demonstration."""


class EvalConfig(Section):
    samples: Count = 8
    """k of avg@k."""
    temperature: NonNegative = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Null: generation.top_p."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """0: no limit; null: generation.top_k."""
    limit: Count | None = None
    """Rows to evaluate; null: all."""
    masked: bool = True
    """Also answer with the image masked, and report the gap."""


class OptimConfig(Section):
    lr: Positive = 1e-6
    """Learning rate."""
    lr_vision: Positive | None = None
    """Of the vision tower without its projector; null: `lr`."""
    lr_projector: Positive | None = None
    """Of the projector; null: `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up: not, linearly or along half a cosine, to its end at the first update that
    the run does not make. Of N updates u = 1..N with W of warm-up and W' = max(W, 1) the part that has been walked is
    (u - W') / (N + 1 - W'): every update of the run moves the weights."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up: the rate of update u is u / warmup_steps of the whole one, never 0."""
    min_lr_fraction: Fraction = 0.0
    """Where the schedule ends, as a fraction of the rate: what the update after the last would have."""
    weight_decay: NonNegative = 0.01
    """Decoupled; none on biases and norms."""
    beta1: Fraction = 0.9
    """Adam's."""
    beta2: Fraction = 0.999
    """Adam's."""
    eps: Positive = 1e-8
    """Adam's."""
    clip_grad: NonNegative = 1.0
    """0: no clipping."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    """An update whose gradient norm exceeds this many times the median of the last 32 is skipped; one whose gradient,
    loss or log-probs (the engine's too) are not finite always is, with a warning that says which."""
    max_skipped: Count = 8
    """Skipped updates in a row that stop the run."""
    precision_aware: bool = False
    """Adam's moments in bfloat16. Needs a GPU, Transformer Engine and parallel.distributed_optimizer."""
    offload_fraction: Fraction = 0.0
    """Share of the optimizer's state and work that lies on the host's CPU, where it takes this rank's share of the
    cores. Needs parallel.distributed_optimizer and bfloat16."""


class CheckpointConfig(Section):
    save_every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    """Older checkpoints are removed."""
    keep_best: bool = True
    """The one of the best held-out accuracy stays too."""
    asynchronous: bool = True
    """Write in the background while the next step runs; false: the step waits."""
    resume: bool = True
    """Go on from the newest complete checkpoint under run.dir."""
    export_at_end: bool = True
    """Write a Hugging Face folder beside the last checkpoint."""
    reference: Path | None = None
    """Weights of the reference policy (Hugging Face folder); by default a copy of the starting policy in CPU memory."""


class ObserveConfig(Section):
    console: bool = True
    """Progress and a line a step."""
    console_every: Count = 1
    """Steps between those lines; every evaluation has its own."""
    tensorboard: bool = True
    """Event files under run.dir/tensorboard."""
    wandb: Annotated[Literal["off", "offline", "online"], NoAsOff] = "off"
    """Offline writes under run.dir."""
    wandb_project: str = "megatron_papo"
    """wandb's project."""
    samples_every: Annotated[int, Field(ge=0)] = 10
    """Steps between pages of samples; 0: none."""
    samples: Count = 8
    """Rollouts on a page."""
    profile_step: Annotated[int, Field(ge=0)] | None = None
    """Step (from 0) of which every rank writes a torch profiler trace under run.dir/profile; that step is slower."""
    calibration: Path | None = None
    """Assumptions of `tools/plan.py --calibrate`, for the figures `planned/...` beside the measured."""
    peak_tflops: Positive | None = None
    """Dense TFLOPS of one GPU in model.dtype, for `mfu`; null: known by the GPU's name, or no `mfu`."""


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
        found = []
        frozen = self.perception.masked_branch == "frozen"
        if frozen and self.loss.masked_entropy_coef > 0:
            found.append(
                "loss.masked_entropy_coef has no gradient with perception.masked_branch=frozen: "
                "the masked log-probs are constants; use joint"
            )
        if self.perception.guard.action != "off" and not self.reads_masked_view:
            found.append("perception.guard watches a term whose coefficient loss.perception_coef is 0")
        if self.train.ahead and self.loss.correction == "none" and self.loss.old_logprobs == "recomputed":
            found.append(
                "train.ahead: rollouts are one step old, which no term of the loss sees with loss.correction=none; "
                "use truncated"
            )
        longest = self.data.max_prompt_tokens + self.generation.max_response_tokens
        needed = longest * (2 if self.reads_joint_rows else 1)
        if self.train.tokens_per_micro_batch < needed:
            views = " in two views" if self.reads_joint_rows else ""
            found.append(
                f"train.tokens_per_micro_batch={self.train.tokens_per_micro_batch} is less than the {needed} tokens of "
                f"the longest sequence{views} (data.max_prompt_tokens + generation.max_response_tokens = {longest}): "
                "a longer sequence than the budget ends the run"
            )
        return found

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.perception.kl == "full" and self.perception.masked_branch == "frozen":
            raise ValueError("perception.kl=full needs perception.masked_branch=joint: a frozen branch keeps no logits")
        self._check_ahead()
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
