"""Finding a dense model's files: a folder, a .gguf file, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from weaver.artifacts.cache import cache_folder
from weaver.artifacts.store import file_digest, read_json
from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError, shell
from weaver.models.gguf import dequantise
from weaver.models.intake import check_links, inside

# README.md is the model card, which names the licence.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# The same weights once more, in the layout of the vendor's own code.
_HUB_DUPLICATES = ["consolidated*", "original/*"]


def locate(model: ModelConfig) -> Path:
    """The folder that holds a model: as named, dequantised from GGUF, or fetched from the hub.

    Raises:
        WeaverError: there is no such model, or the hub did not give it.
    """
    path = local_path(model.path)
    if path.suffix == ".gguf" and path.is_file():
        return dequantise(path, cache_folder() / f"gguf-{file_digest(path)[:16]}")
    if path.is_dir():
        return path.resolve()
    # A hub name may hold dots (Qwen/Qwen2.5-7B), so a suffix alone does not make it a path.
    looks_local = path.suffix == ".gguf" or path.is_absolute() or model.path.count("/") != 1
    if looks_local or path.parent.is_dir():
        found = "a file, and not a model" if path.is_file() else "no such model"
        raise WeaverError(
            f"{model.path}: {found}",
            why="a model is a folder, a .gguf file, or a hub name (owner/name)",
            fix="name one of them, such as HuggingFaceTB/SmolLM2-135M",
        )
    return _download(model)


def local_path(name: str) -> Path:
    """A name as a path: ``~`` and ``~user`` stand for a home.

    Raises:
        WeaverError: there is no such user, or the name is longer than a file system allows.
    """
    try:
        path = Path(name).expanduser()
        # Looking is what finds a name that no file can have.
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise WeaverError(
            f"{shown!r}: no name of a file", why=reason or str(error), fix="name an existing folder"
        ) from error
    return path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, chosen as transformers does: one file, else the index.

    Raises:
        WeaverError: there is none, the index is damaged, or a file lies outside the folder.
    """
    check_links(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [inside(folder, name) for name in _indexed_names(index)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _no_weights(folder)
    return files


def _no_weights(folder: Path) -> WeaverError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    held = f"; its weights lie in {', '.join(pickles[:4])}" if pickles else ""
    code = (
        "import sys, transformers as t; "
        "t.AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])"
    )
    return WeaverError(
        f"{folder}: no *.safetensors file{held}",
        why="weaver reads safetensors only: pickle files can run code when they are opened",
        fix=f"{shell('python', '-c', code, folder)}, if you trust them"
        if pickles
        else "fetch the model's *.safetensors files",
    )


def _indexed_names(index: Path) -> list[str]:
    fix = f"fetch {index.name} again"
    try:
        names = set(read_json(index, rebuild=fix)["weight_map"].values())
        if not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
            raise TypeError
    except (KeyError, TypeError, AttributeError) as error:
        raise WeaverError(
            f"{index}: damaged",
            why="it holds no mapping named weight_map from tensors to *.safetensors files",
            fix=fix,
        ) from error
    return sorted(names)


def _download(model: ModelConfig) -> Path:
    try:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=_HUB_PATTERNS,
                ignore_patterns=_HUB_DUPLICATES,
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise WeaverError(
            f"{model.path}: not a local folder, and the hub did not give it",
            why=reason.splitlines()[0],
            fix="check the name, --revision and the network, or pass a local folder",
        ) from error
