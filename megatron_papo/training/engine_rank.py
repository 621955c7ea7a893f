"""What a verb does on a rank of a separate engine: it serves the trainer's ranks until they end.

Such a rank writes signs of life and watches for failures like any other, but it has no model, no data and no stages.
"""

from __future__ import annotations

from megatron_papo.config import Config
from megatron_papo.distributed.layout import own_rank, place_among_engines
from megatron_papo.generation.remote.engine_supervisor import keep_engine
from megatron_papo.runtime.heartbeat import Heartbeat


def serves(config: Config) -> bool:
    """Whether this process is a rank of a separate engine."""
    return place_among_engines(config.generation.num_engine_ranks) is not None


def serve(config: Config) -> int:
    """Runs the engine of this rank until the trainer ends it. Returns the exit code, 0."""
    place = place_among_engines(config.generation.num_engine_ranks)
    assert place is not None
    with Heartbeat(config.run, own_rank(), lambda: "serve"):
        keep_engine(config, place)
    return 0
