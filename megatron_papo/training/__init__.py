"""What the verbs that run a model share: session, batches, rollouts, the record of steps, checkpoints, guards."""
