"""torch's two formats on disk, read and written without unpickling: the rest of the package imports this module alone.

A checkpoint consists of boxes (`*.distcp`), each a tensor as torch.save writes it, and of `.metadata`, a pickle of
torch.distributed.checkpoint that lists them. torch's own functions are not used for them, for two reasons. Trust: a
checkpoint may be a stranger's, and torch reads `.metadata` with a plain unpickler, which runs whatever the file names.
Memory: torch.load and torch.save want the whole tensor, while the converter passes tensors of many gigabytes through
buffers of megabytes, and so has to know where in a box the values begin. What is written here torch reads, and the
other way round; tests compare both.

    pickle_reading   a pickle as data: no class is imported, nothing is called
    stored_tensor    the bytes around the values of one box
    metadata         `.metadata`: which boxes there are, of which tensor, in which file
"""

from megatron_papo.checkpoint.archive.metadata import COMMON_STATE as COMMON_STATE
from megatron_papo.checkpoint.archive.metadata import METADATA_FILE as METADATA_FILE
from megatron_papo.checkpoint.archive.metadata import StoredBox as StoredBox
from megatron_papo.checkpoint.archive.metadata import StoredTensor as StoredTensor
from megatron_papo.checkpoint.archive.metadata import parse_metadata as parse_metadata
from megatron_papo.checkpoint.archive.metadata import write_metadata as write_metadata
from megatron_papo.checkpoint.archive.pickle_reading import line_of as line_of
from megatron_papo.checkpoint.archive.stored_tensor import BytesFile as BytesFile
from megatron_papo.checkpoint.archive.stored_tensor import frame as frame
from megatron_papo.checkpoint.archive.stored_tensor import values_offset as values_offset
