"""A GPU that is not there: what the code for a GPU does, seen on a machine without one.

CUDA's runtime and driver are answered by small libraries made here (`libraries.py`), which say that one H100 is there;
on top of it torch's FakeTensorMode follows shapes, dtypes and devices of every operation without computing
(`tracing.py`). What it shows: devices and dtypes that do not go together, operators called wrongly, every place where
the host waits for the GPU, and the peak of memory. What it cannot show: values, speed, kernels, collectives, and what
torch.compile, Transformer Engine or vLLM do. `trace.py` traces updates of a shape; `python tools/trace_update.py`
prints them.
"""
