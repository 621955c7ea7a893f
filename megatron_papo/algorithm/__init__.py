"""The algorithm as pure functions of numbers and tensors: advantages, the objective, the guard against collapse.

Nothing here knows ranks, models or Megatron. `losses.py` has the objective; `policy_losses.py`, `credit.py` and
`sequences.py` are where another method adds its own part.
"""
