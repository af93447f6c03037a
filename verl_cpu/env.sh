# Environment of the CPU profile; sourced before Python starts, because verl, vLLM and OpenMP read it at import.
export VERL_PLATFORM=cpu
if [[ ",${VERL_USE_EXTERNAL_MODULES:-}," != *,verl_cpu,* ]]; then
    export VERL_USE_EXTERNAL_MODULES="verl_cpu${VERL_USE_EXTERNAL_MODULES:+,$VERL_USE_EXTERNAL_MODULES}"
fi
# verl registers its FSDP engine for "cuda" and "npu" only; on a CPU the engine is the same.
export VERL_ENGINE_DEVICE=cuda
# nproc knows nothing of a container's quota (docker --cpus), in microseconds of a period: cpu.max, or cgroup v1's files
verl_cpu_count() {
    local cores quota=max period root="${1:-/sys/fs/cgroup}"
    cores="$(nproc)"
    if [[ -r "$root/cpu.max" ]]; then
        read -r quota period <"$root/cpu.max" || true
    elif [[ -r "$root/cpu/cpu.cfs_quota_us" ]]; then
        quota="$(cat "$root/cpu/cpu.cfs_quota_us")" period="$(cat "$root/cpu/cpu.cfs_period_us")"
    fi
    if [[ "$quota" =~ ^[1-9][0-9]*$ ]] && (((quota + period - 1) / period < cores)); then
        cores=$(((quota + period - 1) / period))
    fi
    echo "$cores"
}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(verl_cpu_count)}"
# vLLM's threads share the cores with the trainer's.
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# Lets vLLM keep its scheduler and the model in one process (config/device/cpu.yaml: distributed_executor_backend).
export VLLM_ENABLE_V1_MULTIPROCESSING=0
# Workers are forks of one process (run/worker_forks.py). A fork has none of its threads, but the locks that these held:
# neither OpenBLAS (numpy's, OpenCV's) nor Arrow's allocator may start any as they are imported.
export OPENBLAS_NUM_THREADS=1
export JE_ARROW_MALLOC_CONF="${JE_ARROW_MALLOC_CONF:-background_thread:false}"
# A dozen processes with dozens of threads: without a limit each thread hoards freed memory of its own.
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-2}"
# Whole weights (above 32 MB) go back to the system when they are freed; activations are kept and used again, as paging
# them in anew takes a third of an update.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
# Compiling costs minutes here and gains nothing at this size.
export TORCH_COMPILE_DISABLE=1
# Ray would run its workers at niceness 15, behind everything else on the machine.
export RAY_worker_niceness="${RAY_worker_niceness:-0}"
# Ray would start idle workers ahead of need, which nothing here ever uses.
export RAY_prestart_worker_first_driver=0
export VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0
