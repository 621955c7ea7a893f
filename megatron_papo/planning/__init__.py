"""Which layouts of a model fit a cluster and how long a step takes on each, before any of it is rented. No torch."""
