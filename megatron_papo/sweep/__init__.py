"""Strong and weak scaling: one recipe at several numbers of ranks, as Slurm job arrays or one after the other."""
