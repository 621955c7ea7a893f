"""The model family Qwen2.5-VL: everything that is particular to it, in modules named as `model/family.py` says."""
