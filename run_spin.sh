#!/usr/bin/env bash
# Trains with SPIN / online DPO on this machine; `bash run_spin.sh --help` tells how.
set -euo pipefail

usage() {
    cat <<'TEXT'
bash run_spin.sh [KEY=VALUE ...]
bash run_spin.sh --install

Trains a model with online DPO against a self-play reference (SPIN) on verl. Installs what is needed into .venv on the
first call, unless the active Python has verl and vLLM. KEY=VALUE are Hydra overrides of any verl or SPIN setting, for
example  algorithm.dpo_beta=0.2 trainer.total_training_steps=40

Without a GPU a model of 135 million parameters learns to add numbers; with GPUs Qwen2.5-3B-Instruct trains on GSM8K.
The same command continues an unfinished run; after a finished one it begins another in the next free folder. Other
settings go with another RUN_DIR: an unfinished run is not continued with them (trainer.resume_mode=force insists).

--install makes .venv and nothing else, for the nodes of a cluster before `ray start` (docs/clusters.md).

Environment variables:
  MODEL_PATH            model folder or hub name; owner/name@revision is the model at that commit, tag or branch
  DATA_DIR              folder with train.parquet and test.parquet in verl's format; or name files of other kinds by
                        data.train_files=FILE data.val_files=FILE, and the reward by REWARD_PATH
  REWARD_PATH           file with compute_score(data_source, solution_str, ground_truth, extra_info), whose code is
                        run; without it DATA_DIR/reward.py, whose code is run too, so look at it where the data is
                        somebody else's; then the example's, then verl's own for the data source
  RUN_DIR               folder for checkpoints, metrics and the summary (outputs/PROFILE-DATA); loggers get its name
  SPIN_PROFILE          cpu or gpu (by what the machine has)
  CUDA_VISIBLE_DEVICES  the GPUs to use (all)
  N_GPUS_PER_NODE       GPUs, or ranks on cpu, per machine (the visible GPUs; 1 on cpu)
  NNODES                machines (1); with more the run joins the Ray cluster that is running there
  RAY_ADDRESS           that cluster's address (auto); where it is set, a run on one machine joins that cluster, too
  WANDB_API_KEY         also log to Weights & Biases
  PYTHON                a Python that has verl and vLLM, to be used instead of .venv
  SPIN_TORCH_INDEX      address of PyTorch's package index of CPU builds (pytorch.org tells it), for a smaller
                        installation on cpu where the usual index serves builds for CUDA
TEXT
}

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit
fi
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/env.sh"

# ---- What to train, on what, with what -------------------------------------------------------------------------------

# A ~ that stood in quotes, or behind a =, is no folder to the shell
absolute() {
    local home=~
    case "$1" in
        /*) echo "$1" ;;
        "~" | "~/"*) echo "$home${1#"~"}" ;;
        *) echo "$PWD/${1#./}" ;;
    esac
}

# argument KEY ARGUMENT...: the value that a call's arguments give to KEY, the last one as for Hydra, or nothing.
argument() {
    local key="$1" one value=""
    shift
    for one in "$@"; do
        if [[ "$one" =~ ^(\+|\+\+)?"$key"=(.*)$ ]]; then value="${BASH_REMATCH[2]}"; fi
    done
    echo "$value"
}

# choose_model ARGUMENT...: sets MODEL, which an argument names as well as MODEL_PATH does.
choose_model() {
    local given
    given="$(argument actor_rollout_ref.model.path "$@")"
    if [[ -n "$given" ]]; then
        MODEL="$given"
    elif [[ -n "${MODEL_PATH:-}" ]]; then
        MODEL="$MODEL_PATH"
        if [[ -d "$(absolute "$MODEL")" ]]; then
            MODEL="$(absolute "$MODEL")"
        elif [[ "$MODEL" =~ ^[./~] || ("$MODEL" == */*/* && "$MODEL" != *@*) ]]; then
            spin_die "MODEL_PATH is '$MODEL', and there is no such folder." \
                "Give the path of a Hugging Face model folder, or a hub name such as Qwen/Qwen2.5-3B-Instruct."
        fi
    elif [[ "$SPIN_PROFILE" == cpu ]]; then
        MODEL="$SPIN_MODEL_CACHE/SmolLM2-135M-Instruct"
        spin_run "$PYTHON" "$SPIN_ROOT/examples/embedded_model.py" --output "$MODEL" ||
            spin_die "the model could not be made; the cause stands above." "Remove that cause, or set MODEL_PATH to a model folder."
    else
        MODEL=Qwen/Qwen2.5-3B-Instruct
    fi
}

# make_example NAME: makes one of the examples' data sets unless it is there.
make_example() {
    DATA="$SPIN_ROOT/data/$1"
    NAME="$1"
    if [[ -f "$DATA/train.parquet" && -f "$DATA/test.parquet" ]]; then return; fi
    spin_run "$PYTHON" "$SPIN_ROOT/examples/$1/prepare.py" --output "$DATA" ||
        spin_die "the data set $1 could not be made; the cause stands above." \
            "Remove that cause, or set DATA_DIR to a folder with train.parquet and test.parquet."
}

# A file, or the first of a list of files as Hydra has it, without folder, ending and quotes.
name_of() {
    local first="${1#[}"
    first="$(basename -- "$(tr -d "\"'\\\\" <<<"${first%%[],]*}")")"
    echo "${first%.*}"
}

# choose_data ARGUMENT...: sets DATA, a folder or nothing where the arguments name the files, and NAME for the run.
choose_data() {
    local files name
    files="$(argument data.train_files "$@")"
    if [[ -n "${DATA_DIR:-}" ]]; then
        DATA="$(absolute "${DATA_DIR%/}")"
        NAME="$(basename "$DATA")"
        for name in train test; do
            if [[ ! -f "$DATA/$name.parquet" ]]; then
                spin_die "DATA_DIR is '$DATA_DIR', and there is no file $DATA/$name.parquet." \
                    "Make it in verl's format (examples/arithmetic/prepare.py shows how), or unset DATA_DIR."
            fi
        done
    elif [[ -n "$files" ]]; then
        if [[ -z "$(argument data.val_files "$@")" ]]; then
            spin_die "data.train_files is given, and data.val_files is not." \
                "Name a file of held-out prompts in it, or set DATA_DIR to a folder with train.parquet and test.parquet."
        fi
        DATA=""
        NAME="$(name_of "$files")"
    elif [[ "$SPIN_PROFILE" == cpu ]]; then
        make_example arithmetic
    else
        make_example gsm8k
    fi
}

# choose_reward ARGUMENT...: sets REWARD to a file, or to nothing where an argument tells, or verl takes its own reward
# for the rows' data_source.
choose_reward() {
    local file
    REWARD=""
    if [[ -n "$(argument reward.custom_reward_function.path "$@")" ]]; then return; fi
    if [[ -n "${REWARD_PATH:-}" ]]; then
        REWARD="$(absolute "$REWARD_PATH")"
        if [[ ! -f "$REWARD" ]]; then
            spin_die "REWARD_PATH is '$REWARD_PATH', and there is no such file." "Give a Python file with compute_score."
        fi
        return
    fi
    if [[ -z "$DATA" ]]; then return; fi
    for file in "$DATA/reward.py" "$SPIN_ROOT/examples/$NAME/reward.py"; do
        if [[ -f "$file" ]]; then
            REWARD="$file"
            return
        fi
    done
}

check_count() {
    if [[ ! "$2" =~ ^[1-9][0-9]*$ ]]; then spin_die "$1 is '$2'." "Set it to a whole number of at least 1."; fi
}

choose_machines() {
    local default=1
    if [[ "$SPIN_PROFILE" == gpu ]]; then
        default="$(spin_gpu_count)"
        if [[ "$default" == 0 && -z "${N_GPUS_PER_NODE:-}" ]]; then
            spin_die "the profile is gpu, and no GPU is visible." \
                "Check nvidia-smi -L and CUDA_VISIBLE_DEVICES, set N_GPUS_PER_NODE, or use SPIN_PROFILE=cpu."
        fi
    fi
    N_GPUS_PER_NODE="${N_GPUS_PER_NODE:-$default}"
    NNODES="${NNODES:-1}"
    check_count N_GPUS_PER_NODE "$N_GPUS_PER_NODE"
    check_count NNODES "$NNODES"
    if ((NNODES > 1)); then export RAY_ADDRESS="${RAY_ADDRESS:-auto}"; fi
}

# choose_run_dir ARGUMENT...: sets RUN to the folder that an argument names, whatever it holds; else to the first of
# RUN_DIR, RUN_DIR-2, RUN_DIR-3 ... that holds no finished run.
choose_run_dir() {
    local base given number=1
    given="$(argument trainer.default_local_dir "$@" | tr -d "\"'")"
    if [[ -n "$given" ]]; then
        RUN="$(absolute "$given")"
        return
    fi
    base="$(absolute "${RUN_DIR:-$SPIN_ROOT/outputs/$SPIN_PROFILE-$NAME}")"
    base="${base%/}"
    RUN="$base"
    while [[ -e "$RUN/summary.json" ]]; do
        number=$((number + 1))
        RUN="$base-$number"
    done
}

tell() {
    spin_say "profile: $SPIN_PROFILE, $NNODES x $N_GPUS_PER_NODE $(if [[ "$SPIN_PROFILE" == gpu ]]; then echo GPU; else echo rank; fi)(s)"
    spin_say "model:   $MODEL"
    spin_say "data:    ${DATA:-as the arguments say}"
    if [[ -n "$REWARD" ]]; then
        spin_say "reward:  $REWARD (its code is run)"
    else
        spin_say "reward:  as arguments and preference source say, else the one that verl has for the data source"
    fi
    if [[ -n "$(ls -A "$RUN" 2>/dev/null)" ]]; then
        spin_say "run:     $RUN, unfinished: continuing from its last checkpoint, or from the start if it has none"
    else
        spin_say "run:     $RUN"
    fi
}

# override KEY VALUE: appends a Hydra override whose value may hold any character.
override() {
    local quote="'"
    OVERRIDES+=("$1='${2//$quote/\\$quote}'")
}

spin_setup
if [[ "${1:-}" == --install ]]; then
    spin_say "ready: $PYTHON; start Ray with it on each node: $(dirname "$PYTHON")/ray start ..."
    exit
fi
choose_model "$@"
choose_data "$@"
choose_reward "$@"
choose_machines
choose_run_dir "$@"
tell

OVERRIDES=("device=$SPIN_PROFILE" "trainer.nnodes=$NNODES" "trainer.n_gpus_per_node=$N_GPUS_PER_NODE")
override actor_rollout_ref.model.path "$MODEL"
if [[ -n "$DATA" ]]; then
    override data.train_files "$DATA/train.parquet"
    override data.val_files "$DATA/test.parquet"
fi
override trainer.default_local_dir "$RUN"
override trainer.experiment_name "$(basename "$RUN")"
if [[ -n "$REWARD" ]]; then override reward.custom_reward_function.path "$REWARD"; fi
if [[ -n "${WANDB_API_KEY:-}" ]]; then OVERRIDES+=("trainer.logger=[file,wandb]"); fi

# exec: signals reach Python itself. By its file: with -m the folder of the call comes first, and may hold a recipe/spin
exec "$PYTHON" "$SPIN_ROOT/pythonpath/main_spin.py" "${OVERRIDES[@]}" "$@"
