#!/usr/bin/env bash
# Writes constraints/*.lock: the versions of constraints/*.txt with the hashes of all files that the package index has of
# them. To be called when a version changes; needs uv: bash scripts/lock.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../constraints"

# PyTorch's builds for CPUs are in an index of its own, which lists these hashes (Linux on x86_64 and aarch64, Python 3.10
# to 3.12).
torch="2.13.0"
torch_cpu_hashes=(
    0555fde6108ca90247ae33d4e1237cbae475c86a223bb2f0f91d9addf1f611bd
    4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2
    6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
    6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604
    84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7
    f028e428bddee95cdb86e2470254e95c9af629362488550c200ed4793125a817
    f5cbb61180a9793d9e12fe115a2310d2600bd449dfb9a01ec5640e21359fa5ea
)
if ! grep -qx "torch==$torch" cpu.txt; then
    echo "cpu.txt has another version of torch than $torch, of which scripts/lock.sh has the hashes: put the new ones here" >&2
    exit 1
fi

# lock LIST [OPTION...]: the lists are whole, so that no package's requirements have to be looked for.
lock() {
    uv pip compile "$1.txt" --quiet --no-deps --universal --python-version 3.10 --generate-hashes --no-annotate \
        --custom-compile-command "bash scripts/lock.sh" --output-file "$1.lock" "${@:2}"
}
lock gpu
lock cpu_cuda
lock cpu --no-emit-package torch
sed -i '/^# The following packages were excluded/,$d' cpu.lock
{
    echo "torch==$torch+cpu \\"
    printf '    --hash=sha256:%s \\\n' "${torch_cpu_hashes[@]:1}"
    echo "    --hash=sha256:${torch_cpu_hashes[0]}"
} >>cpu.lock
