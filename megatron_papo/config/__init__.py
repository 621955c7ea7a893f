"""The one tree of settings. Unknown keys and impossible combinations are refused with the key's path.

Nothing here imports torch, so that the command line can refuse a bad setting before any rank starts.
"""

from megatron_papo.config.certify import CertifyConfig as CertifyConfig
from megatron_papo.config.certify import LimitsConfig as LimitsConfig
from megatron_papo.config.cluster import ClusterConfig as ClusterConfig
from megatron_papo.config.fp8 import Fp8Config as Fp8Config
from megatron_papo.config.generation import GenerationConfig as GenerationConfig
from megatron_papo.config.load import ConfigError as ConfigError
from megatron_papo.config.load import dump_config as dump_config
from megatron_papo.config.load import load_config as load_config
from megatron_papo.config.load import plain_tree as plain_tree
from megatron_papo.config.tree import MOST_IMAGE_PIXELS as MOST_IMAGE_PIXELS
from megatron_papo.config.tree import CheckpointConfig as CheckpointConfig
from megatron_papo.config.tree import ColumnsConfig as ColumnsConfig
from megatron_papo.config.tree import Config as Config
from megatron_papo.config.tree import DataConfig as DataConfig
from megatron_papo.config.tree import DynamicSamplingConfig as DynamicSamplingConfig
from megatron_papo.config.tree import EntropyConfig as EntropyConfig
from megatron_papo.config.tree import FreezeConfig as FreezeConfig
from megatron_papo.config.tree import GuardConfig as GuardConfig
from megatron_papo.config.tree import LossConfig as LossConfig
from megatron_papo.config.tree import MaskConfig as MaskConfig
from megatron_papo.config.tree import ModelConfig as ModelConfig
from megatron_papo.config.tree import ObserveConfig as ObserveConfig
from megatron_papo.config.tree import OptimConfig as OptimConfig
from megatron_papo.config.tree import OverlongConfig as OverlongConfig
from megatron_papo.config.tree import ParallelConfig as ParallelConfig
from megatron_papo.config.tree import PerceptionConfig as PerceptionConfig
from megatron_papo.config.tree import RewardConfig as RewardConfig
from megatron_papo.config.tree import RunConfig as RunConfig
from megatron_papo.config.tree import TrainConfig as TrainConfig
