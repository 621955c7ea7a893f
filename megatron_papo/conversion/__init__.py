"""Hugging Face folder <-> checkpoint, tensor by tensor: planned from headers, streamed through a bounded memory.

    spans       which rows of which Hugging Face tensor are which rows of a parameter
    stores      where rows lie in files; huggingface_files and checkpoint_files (checkpoint_plan) know the
                two formats, box_sums the checksum of a box that streams by
    plan        what is written where, in files that one worker writes each
    stream      rows through a few buffers: read, cast, hashed (hashing), written
    journal     what is written already, so that an interrupted conversion goes on
    manifest    a hash of every tensor, source and target; verify proves them, compare compares two folders
    crew        the workers among themselves; progress is what they show
    convert     the conversion itself; command is what the tool calls

No model is built, no Megatron is imported, no GPU is needed.
"""
