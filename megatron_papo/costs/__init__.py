"""What a model costs, by arithmetic: FLOPs, parameters, memory and activations; and the table of GPUs. No torch."""
