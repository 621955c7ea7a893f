"""What the tests share, one file a topic.

- Processes: `ranks` runs a function on N gloo ranks, `commands` a command; `processes`, `process_server`,
  `process_wire` and `interpreter` fork both from a server that has imported what is slow to import; `ports` gives
  free ports; `workers` says which tests share a worker.
- `layouts`: layouts of ranks by name, such as "TP2 SP, full recompute".
- Models: `tiny` writes a tiny Qwen2.5-VL folder (by `examples/quickstart/model_folder.py`), `smollm` one with
  pretrained weights, `gated_mlp` is an MLP between two given functions.
- Runs: `tiny_run` has the settings and the data of a whole run, `inputs` the fixture of what such runs read, `slow`
  the rewards that disturb one.
- Machines: `slurm_lab` is the fixture of a Slurm cluster, `small_disk` a full disk, `chaos` kills and damages,
  `gpu_optimizers` stands in for what only a machine with a GPU has.
- `source_tree` reads the imports of the package.
"""
