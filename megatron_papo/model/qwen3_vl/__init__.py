"""The model family Qwen3-VL, dense: everything that is particular to it, in modules named as `model/family.py` says."""
