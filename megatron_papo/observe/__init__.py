"""What a run shows of itself: stages and their times, metrics, samples, reports, and why it ended when it failed."""
