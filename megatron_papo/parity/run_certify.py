"""`papo certify`: the certificate of a model, a layout and an engine, without training.

Prints one line for each kind of part and where the page lies; the exit code is 1 when a part departs.
"""

from __future__ import annotations

from contextlib import closing

from megatron_papo.config import Config
from megatron_papo.generation import build_generator
from megatron_papo.parity.certifier import Certifier
from megatron_papo.runtime.failures import RunStopped
from megatron_papo.training.console import say
from megatron_papo.training.engine_rank import serve, serves
from megatron_papo.training.rollouts import hand_over
from megatron_papo.training.session import open_run


def main(config: Config) -> int:
    """Makes the certificate of `config`; the exit code. Raises RunStopped, with its name, when a part departs."""
    if serves(config):
        return serve(config)
    with open_run(config, config.generation.num_engine_ranks) as run:
        with run.clock.stage("set_up"):
            generator = build_generator(config, run.processor, run.layout, run.clock.report)
        with closing(generator):
            with run.clock.stage("hand_over"):
                hand_over(run, generator, policy_version=0)
            certifier = Certifier(run, generator)
            certificate = certifier.at_start(0, weights_moved=False)
        for line in certificate.summary():
            say(run, line)
        say(run, f"certificate: {certifier.page_of(0)}")
        if certificate.departure is not None:
            raise RunStopped(certificate.verdict)
        say(run, certificate.verdict)
    return 0
