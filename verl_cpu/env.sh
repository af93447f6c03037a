# Environment of the CPU profile; sourced before Python starts, because verl, vLLM and OpenMP read it at import.
export VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_cpu
# verl registers its FSDP engine for "cuda" and "npu" only; on a CPU the engine is the same.
export VERL_ENGINE_DEVICE=cuda
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
# vLLM: 1 GB of key-value cache, and threads that share the cores with the trainer's.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# Compiling costs minutes here and gains nothing at this size.
export TORCH_COMPILE_DISABLE=1
# One machine: keep gloo and vLLM's server off the network.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
export VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0
