"""What the files hold that settings name: with others under the same names a run would be another."""

import hashlib
from pathlib import Path

from omegaconf import DictConfig

from recipe.spin.checks.data_files import count_rows, files_of
from recipe.spin.checks.model_files import WEIGHTS
from recipe.spin.checks.reward_file import reward_files
from recipe.spin.common.digests import DIGITS, digest

# Of a model's folder: what it computes, how it ends, and how messages become tokens
MODEL_FILES = ("*config.json", "tokenizer*", "vocab.json", "merges.txt", "chat_template*", *WEIGHTS)
PIECES, PIECE_BYTES = 64, 2**16  # read of a file of weights


def contents_of(config: DictConfig) -> dict[str, str]:
    """By file, in words to be compared: the data, the reward, the judge's prompt, and the model where it is a folder.

    What verl or the hub fetches is left out, and so is what a reward imports.
    """
    found = {}
    for files in (config.data.train_files, config.data.val_files):
        for file in (Path(name) for name in files_of(files) if "://" not in name):
            found[file] = f"{count_rows(file)} rows, {digest(file)}"
    texts = reward_files(config.reward.custom_reward_function)
    texts += [config.algorithm.judge.prompt] if config.algorithm.preference_source == "judge" else []
    found |= {file: digest(file) for file in map(Path, filter(None, texts))}
    model = Path(config.actor_rollout_ref.model.path)
    for pattern in MODEL_FILES:
        found |= {file: _digest_of_pieces(file) for file in sorted(model.glob(pattern)) if file.is_file()}
    return {str(file): words for file, words in found.items()}


def _digest_of_pieces(file: Path) -> str:
    """Size, and a digest of pieces all over the file: it may have gigabytes, and training changes all its layers."""
    size, hash = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as content:
        for number in range(PIECES):
            content.seek(max(0, size - PIECE_BYTES) * number // (PIECES - 1))
            hash.update(content.read(PIECE_BYTES))
    return f"{size} bytes, sha256 of {PIECES} pieces {hash.hexdigest()[:DIGITS]}"
