"""Checkpoints of a run: weights, optimizer, random numbers and place in the data, saved and resumed on any layout.

A tensor is stored whole, as a grid of boxes: a box is a stored slice of a tensor, written by the rank that holds it.
The files are in Megatron-Core's format. In the order of reading:

    state               what a checkpoint holds; taking a snapshot of a run, and filling a run from a folder
    store               the checkpoints of a run: saving in the background, keeping the last few and the best
    resume, survey      the newest checkpoint that is whole, and which checkpoints a folder has
    sharding            which boxes of which stored tensors this rank holds
    optimizer_state     the state of Megatron's optimizers, parameter by parameter
    random_states       the states of this rank's random number generators
    staging             host memory for a copy of the state, so that training continues while it is written
    box_writing, box_reading   the boxes of all ranks to files, and back
    opening             the small files of a checkpoint, read and checked
    state_file          state.json, which says what the folder is
    checksums           checksums of boxes and files
    archive             torch's formats on disk; nothing is unpickled
    weight_loading      weights alone, from a checkpoint or a Hugging Face folder
    weight_fingerprint  which weights a folder holds, as a short text
"""
