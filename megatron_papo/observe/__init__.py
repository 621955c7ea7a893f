"""What a run shows: stages and their times, metrics and where they are written, samples, and reports."""
