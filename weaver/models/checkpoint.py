"""A dense model on disk, found, identified and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.manifest import ModelIdentity
from weaver.artifacts.store import (
    canonical_json,
    check_tensors_file,
    file_digest,
    text_digest,
)
from weaver.config.sections import DtypeName, ModelConfig
from weaver.errors import WeaverError
from weaver.models.families import Family, activation_name, find_family
from weaver.models.locate import locate, weight_files

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Early Llama checkpoints store the rotary frequencies, which transformers derives from the config.
_DERIVED = ".rotary_emb.inv_freq"
# Configuration entries that say where and by what it was read, not what the model is.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class FfnBiases:
    """Which projections of the FFN have a bias."""

    gate: bool
    up: bool
    output: bool


class Checkpoint:
    """A dense model's folder: configuration, tokenizer, and tensors by name.

    Raises:
        WeaverError: no such model, not safetensors, damaged, or of an unknown family.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.folder = locate(model)
        self.config: PreTrainedConfig = self._load_config()
        self.family: Family = find_family(self.config.model_type, model=model.path)
        self._check_not_quantised()
        self.activation = activation_name(
            getattr(self.config, self.family.activation_field), model=model.path
        )
        self._files = dict(self._entries(weight_files(self.folder)))
        self._check_ffn_names()

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def intermediate_size(self) -> int:
        return int(self.config.intermediate_size)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype most weights are stored in, read from the first FFN."""
        return self.tensor(f"{self._ffn_prefix(0)}{self.family.gate}.weight").dtype

    def resolve_dtype(self, name: DtypeName) -> torch.dtype:
        """``auto`` is the checkpoint's own dtype."""
        return self.dtype if name == "auto" else DTYPES[name]

    def names(self) -> list[str]:
        """Every tensor in the checkpoint."""
        return sorted(self._files)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in.

        Raises:
            WeaverError: the checkpoint holds no such tensor.
        """
        if name not in self._files:
            raise WeaverError(
                f"{self.folder}: holds no tensor {name!r}",
                why=f"the row {self.family.model_type!r} of the family table names it; "
                f"the checkpoint has {', '.join(self.names()[:4])}, ...",
                fix="check that this is the whole checkpoint of a causal language model",
            )
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    def shape(self, name: str) -> list[int]:
        """Shape of one tensor, without reading it."""
        with safe_open(self._files[name], framework="pt") as handle:
            return list(handle.get_slice(name).get_shape())

    def layer_prefix(self, layer: int) -> str:
        return f"{self.family.layers}.{layer}."

    def layer_names(self, layer: int) -> list[str]:
        """Tensors of one decoder layer."""
        prefix = self.layer_prefix(layer)
        return [name for name in self.names() if name.startswith(prefix)]

    def outer_names(self) -> list[str]:
        """Tensors outside the decoder layers."""
        return [name for name in self.names() if not name.startswith(f"{self.family.layers}.")]

    def is_ffn(self, name: str) -> bool:
        """Whether a tensor belongs to a decoder layer's FFN."""
        parts = name.removeprefix(f"{self.family.layers}.").split(".")
        return name.startswith(f"{self.family.layers}.") and parts[1] == self.family.ffn

    def layer_state(self, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """State dict of one decoder layer without its FFN."""
        prefix = self.layer_prefix(layer)
        return {
            name.removeprefix(prefix): self.tensor(name).to(dtype)
            for name in self.layer_names(layer)
            if not self.is_ffn(name)
        }

    def ffn(self, layer: int, dtype: torch.dtype) -> GluWeights:
        """The FFN of one layer, neuron j in row j of every matrix."""
        gate_FD, gate_bias = self._projection(layer, self.family.gate)
        up_FD, up_bias = self._projection(layer, self.family.up)
        if self.family.fused:
            gate_FD, up_FD = gate_FD.chunk(2)[0], up_FD.chunk(2)[1]
            gate_bias = None if gate_bias is None else gate_bias.chunk(2)[0]
            up_bias = None if up_bias is None else up_bias.chunk(2)[1]
        down_DF, output_bias = self._projection(layer, self.family.down)
        return GluWeights(
            gate_FD=gate_FD.contiguous(),
            up_FD=up_FD.contiguous(),
            down_FD=down_DF.T.contiguous(),
            activation=self.activation,
            gate_bias_F=gate_bias,
            up_bias_F=up_bias,
            output_bias_D=output_bias,
        ).to(dtype)

    @property
    def ffn_biases(self) -> FfnBiases:
        """Biases of the first FFN; all layers of a family have the same."""
        gate, up, output = (
            f"{self._ffn_prefix(0)}{part}.bias" in self._files
            for part in (self.family.gate, self.family.up, self.family.down)
        )
        return FfnBiases(gate, up, output)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            WeaverError: the folder holds none that transformers can load.
        """
        return load_tokenizer(self.folder, trust_remote_code=self.model.trust_remote_code)

    def total_parameters(self) -> int:
        """Parameters of the dense model, a tied output head counted once."""
        names = self.names()
        if getattr(self.config, "tie_word_embeddings", False):
            names = [name for name in names if name != "lm_head.weight"]
        return sum(int(torch.tensor(self.shape(name)).prod()) for name in names)

    def identity(self, known: ModelIdentity | None = None) -> ModelIdentity:
        """Digests of the weights and the tokenizer.

        Args:
            known: an earlier identity; if the sizes and times of the weight files and of
                ``config.json`` agree, its digest is taken over.
        """
        files = {
            path.name: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in [*sorted(set(self._files.values())), self.folder / "config.json"]
        }
        unchanged = known is not None and known.files == files and known.folder == str(self.folder)
        digest = known.digest if known is not None and unchanged else self._digest()
        return ModelIdentity(
            path=self.model.path,
            folder=str(self.folder),
            revision=self.model.revision,
            trust_remote_code=self.model.trust_remote_code,
            model_type=self.config.model_type,
            digest=digest,
            tokenizer_digest=self._tokenizer_digest(),
            files=files,
        )

    def _digest(self) -> str:
        config = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_THE_MODEL}
        weights = {path.name: file_digest(path) for path in set(self._files.values())}
        return text_digest(canonical_json([json.loads(json.dumps(config, default=str)), weights]))

    def _tokenizer_digest(self) -> str:
        digest = hashlib.sha256()
        for name in (*_TOKENIZER_FILES, "tokenizer_config.json"):
            path = self.folder / name
            if path.is_file():
                digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _load_config(self) -> PreTrainedConfig:
        try:
            raw, _ = PreTrainedConfig.get_config_dict(self.folder)
            # Before AutoConfig, which knows neither converted types nor types of the future.
            if "model_type" not in raw:
                raise ValueError("config.json is missing, or names no model_type")
            find_family(str(raw["model_type"]), model=self.model.path)
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=self.model.trust_remote_code
            )
            return config
        except (OSError, ValueError) as error:
            raise WeaverError(
                f"{self.folder}: no configuration that transformers can load",
                why=str(error).splitlines()[0],
                fix="pass a folder with config.json and *.safetensors, a .gguf file or a hub name",
            ) from error

    def _entries(self, files: list[Path]) -> Iterator[tuple[str, Path]]:
        for path in files:
            check_tensors_file(path, rebuild=f"fetch {path.name} of {self.model.path} again")
            try:
                with safe_open(path, framework="pt") as handle:
                    names = handle.keys()
            except SafetensorError as error:
                raise WeaverError(
                    f"{path}: damaged", why=str(error), fix=f"fetch {path.name} again"
                ) from error
            yield from ((name, path) for name in names if not name.endswith(_DERIVED))

    def _check_ffn_names(self) -> None:
        for part in (self.family.gate, self.family.up, self.family.down):
            name = f"{self._ffn_prefix(0)}{part}.weight"
            if name not in self._files:
                raise WeaverError(
                    f"{self.model.path}: no GLU feed-forward found, {name!r} is missing",
                    why=f"model_type {self.config.model_type!r} should hold it; the checkpoint "
                    f"has {', '.join(self.layer_names(0)[:6]) or self.names()[:4]}",
                    fix="pass the whole causal language model, or mend the row in "
                    "weaver/models/families.py",
                )

    def _check_not_quantised(self) -> None:
        quantisation = getattr(self.config, "quantization_config", None)
        if quantisation is not None:
            method = dict(quantisation).get("quant_method", "unnamed")
            raise WeaverError(
                f"{self.model.path}: quantised weights, quant_method {method!r}",
                why="an FFN is split by the values of its weights, which lie packed here",
                fix="pass the model's bf16, fp16 or fp32 release, or a .gguf file",
            )

    def _ffn_prefix(self, layer: int) -> str:
        return f"{self.layer_prefix(layer)}{self.family.ffn}."

    def _projection(self, layer: int, part: str) -> tuple[Tensor, Tensor | None]:
        name = f"{self._ffn_prefix(layer)}{part}"
        bias = f"{name}.bias"
        return self.tensor(f"{name}.weight"), self.tensor(bias) if bias in self._files else None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        WeaverError: the folder holds none that transformers can load.
    """
    try:
        # Without any of them transformers makes up a tokenizer that knows no word.
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ValueError(f"the folder holds none of {', '.join(_TOKENIZER_FILES)}")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise WeaverError(
            f"{folder}: no tokenizer",
            why=str(error).splitlines()[0],
            fix="copy tokenizer.json and tokenizer_config.json into the model's folder",
        ) from error
