# NCCL, the fabric under it, and a few variables of CUDA and torch: the one place for them. Sourced by launch.sh, before
# the job's own settings (`cluster.variables`, or what a shell exported before sbatch), which therefore win.
#
# Only what is safe on every cluster is set. The rest stands here with the sign that asks for it. `NCCL_DEBUG=INFO`
# prints at start which network, which interface and which GPU-to-NIC paths NCCL chose: look there first.

# WARN prints the reason when a connection fails, and nothing otherwise. INFO: what was chosen (NET/IB, NVLS, rings).
: "${NCCL_DEBUG:=WARN}"

# A rank whose collective fails or runs into parallel.timeout_s aborts it and ends, so that the run can start again,
# instead of spinning on the GPU for ever. 1 is torch's default; written out since a shell may have switched it off.
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=1}"

# One hardware queue for kernels, so that communication is issued in the order in which Megatron-Core writes it: what
# it asks for with tensor or sequence parallelism on Hopper and before. Blackwell does not need it.
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"

export NCCL_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING CUDA_DEVICE_MAX_CONNECTIONS

# --- Which interface. NCCL and gloo exchange addresses over TCP before NCCL goes over to InfiniBand. Left alone, NCCL
# takes the first interface that begins with `ib`, else the first that is neither `lo` nor `docker`; gloo takes the one
# that the host's name resolves to. Set both when ranks hang at the start on "connect timed out" or "no route to host":
# a node has several networks, and the wrong one was taken. `ip -br -4 addr` on two nodes shows which one they share.
# `^docker,lo` means: any but those; `=ib0` means: this very one, not all that begin so.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0        # gloo takes one whole name and no pattern

# --- Which InfiniBand cards. NCCL uses all active ones. Name those of the compute fabric when a node also has cards for
# storage: `ibstat` or `ibdev2netdev` lists them; the sign is bandwidth far below the fabric's.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5

# --- RoCE instead of InfiniBand: the index of the RoCE v2 address, from `show_gids`. The sign: "ibv_modify_qp failed".
# export NCCL_IB_GID_INDEX=3

# --- GPUDirect RDMA: cards read GPU memory without a copy through the host. NCCL uses it where card and GPU hang on one
# PCIe switch (PHB: also where they share a socket). NCCL_DEBUG=INFO writes `GDRDMA` behind a channel that uses it; if
# none does, the module nvidia_peermem is not loaded (`lsmod | grep nvidia_peermem`): ask the administrators.
# export NCCL_NET_GDR_LEVEL=PHB

# --- A busy or lossy fabric: how long a card waits for an answer (4.096 us x 2^n; 20 is NCCL's own since 2.23) and how
# often it tries again. The sign: "Got completion ... error 12" (a lost peer looks the same).
# export NCCL_IB_TIMEOUT=22
# export NCCL_IB_RETRY_CNT=7

# --- No InfiniBand that works: plain TCP. Slow, and a quick way to tell a fabric's fault from a program's.
# export NCCL_IB_DISABLE=1

# --- AWS EFA, Google's and Azure's fabrics come as a plugin of NCCL (libnccl-net.so) that the machine's image installs;
# NCCL_DEBUG=INFO names it. For EFA:
# export FI_PROVIDER=efa

# --- NVLink SHARP (H100 and later, within a node) costs NCCL some hundred MiB of each GPU. 0 where these are needed, or
# where starting fails with "Failed to bind NVLink SHARP": the fabric manager is older than the driver.
# export NCCL_NVLS_ENABLE=0

# --- UCX is used by MPI, not by NCCL: only where an MPI of the cluster starts the ranks.
# export UCX_NET_DEVICES=mlx5_0:1

# --- The allocator grows its segments instead of adding others: fewer failures for want of memory in one piece while a
# lot is free. Left off since vLLM's memory pools did not go with it in all versions.
# export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# --- After a collective ran into its time limit, every rank writes its last collectives: which rank did not come.
# export TORCH_FR_BUFFER_SIZE=2000     # how many are remembered
# export TORCH_NCCL_DUMP_ON_TIMEOUT=1
