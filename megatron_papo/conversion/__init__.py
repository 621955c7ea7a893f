"""Converts Hugging Face folders to checkpoints and back, tensor by tensor in bounded memory, and proves the result.

What goes where is planned from headers; then the rows of every parameter pass through a few buffers, are cast and
hashed, and are written. No model is built, no Megatron is imported, no GPU is needed. In the order of reading:

    export              what `papo export` does: a run's checkpoint converted, and uploaded
    hub                 the upload of a folder to the Hugging Face hub
    run_conversion      what the command line tool calls
    convert             a whole conversion, from the plan to the published folder
    plan                what is written where, in files that one worker writes each
    stores              the rows of a parameter, and where a store has them in files
    huggingface_files   the store of a Hugging Face folder
    checkpoint_files    the store of a checkpoint; it consists of boxes, stored slices of parameters
    stream              rows through buffers: read, cast, hashed, written
    journal             writing one file, with a record by which an interrupted conversion continues
    manifest            manifest.json, a hash of every tensor in source and target
    verify              proves a folder by its manifest, or compares two folders
    workers             the workers among themselves, and their progress
"""
