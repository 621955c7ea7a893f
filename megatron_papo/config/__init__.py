"""The one tree of settings. Unknown keys and impossible combinations are refused with the key's path.

Nothing here imports torch, so that the command line can refuse a bad setting before any rank starts.
"""

from megatron_papo.config.certify import CertifyConfig as CertifyConfig
from megatron_papo.config.certify import LimitsConfig as LimitsConfig
from megatron_papo.config.checkpoint import CheckpointConfig as CheckpointConfig
from megatron_papo.config.cluster import ClusterConfig as ClusterConfig
from megatron_papo.config.data import MOST_IMAGE_PIXELS as MOST_IMAGE_PIXELS
from megatron_papo.config.data import ColumnsConfig as ColumnsConfig
from megatron_papo.config.data import DataConfig as DataConfig
from megatron_papo.config.data_sources import SourceConfig as SourceConfig
from megatron_papo.config.fp8 import Fp8Config as Fp8Config
from megatron_papo.config.generation import GenerationConfig as GenerationConfig
from megatron_papo.config.load import ConfigError as ConfigError
from megatron_papo.config.load import dump_config as dump_config
from megatron_papo.config.load import load_config as load_config
from megatron_papo.config.load import plain_tree as plain_tree
from megatron_papo.config.loss import EntropyConfig as EntropyConfig
from megatron_papo.config.loss import LossConfig as LossConfig
from megatron_papo.config.model import FreezeConfig as FreezeConfig
from megatron_papo.config.model import ModelConfig as ModelConfig
from megatron_papo.config.observe import ObserveConfig as ObserveConfig
from megatron_papo.config.optim import OptimConfig as OptimConfig
from megatron_papo.config.parallel import ParallelConfig as ParallelConfig
from megatron_papo.config.perception import GuardConfig as GuardConfig
from megatron_papo.config.perception import MaskConfig as MaskConfig
from megatron_papo.config.perception import PerceptionConfig as PerceptionConfig
from megatron_papo.config.reward import OverlongConfig as OverlongConfig
from megatron_papo.config.reward import RewardConfig as RewardConfig
from megatron_papo.config.run import RunConfig as RunConfig
from megatron_papo.config.training import DynamicSamplingConfig as DynamicSamplingConfig
from megatron_papo.config.training import TrainConfig as TrainConfig
from megatron_papo.config.tree import Config as Config
