"""The weights that a run starts from, loaded into the policy; and the reference policy, which is made of them."""

from __future__ import annotations

from pathlib import Path

from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.checkpoint.weight_loading import load_weights
from megatron_papo.distributed.layout import Layout
from megatron_papo.files.small_files import print_warning
from megatron_papo.model.policy import VisionLanguageModel
from megatron_papo.model.shape import ModelShape
from megatron_papo.optimization.reference import ReferencePolicy
from megatron_papo.text.untrusted import as_text
from megatron_papo.weights import first_look
from megatron_papo.weights.held import held_parameters
from megatron_papo.weights.weight_files import weight_files


def load_starting_weights(policy: VisionLanguageModel, shape: ModelShape, folder: Path, layout: Layout) -> None:
    """Loads the weights of a Hugging Face folder or of a checkpoint into `policy`. Those of a Hugging Face folder are
    then checked once more against the files (`weights/first_look.py`); all ranks call it together."""
    load_weights(policy, shape, folder)
    if names_checkpoint(folder):
        return
    first_look.look(folder, shape, held_parameters(policy, shape, layout.tensor_size), layout.tensor_rank)
    note = weight_files(folder).note()
    if note and layout.rank == 0:
        print_warning(as_text(note))


def starting_reference(
    policy: VisionLanguageModel, shape: ModelShape, folder: Path | None, layout: Layout
) -> ReferencePolicy:
    """The reference policy: the weights of `folder` (`checkpoint.reference`), or those that `policy` has now.

    `policy` itself has the same weights afterwards as before.
    """
    if folder is None:
        return ReferencePolicy(policy)
    own = ReferencePolicy(policy)
    load_starting_weights(policy, shape, folder, layout)
    reference = ReferencePolicy(policy)
    own.copy_into(policy)
    return reference
