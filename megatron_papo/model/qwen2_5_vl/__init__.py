"""The family Qwen2.5-VL: everything that is particular to it, by the fixed module names of `model/family.py`."""
