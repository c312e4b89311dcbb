"""A model to convert on disk, found, identified and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.dtypes import DTYPES
from weaver.artifacts.manifest import ModelIdentity
from weaver.artifacts.store import (
    canonical_json,
    file_digest,
    text_digest,
)
from weaver.config.sections import DtypeName, ModelConfig
from weaver.errors import WeaverError
from weaver.models.accounting import DenseFfnSize, LayerShape
from weaver.models.device import CPU
from weaver.models.families import (
    CONVERTED_PREFIX,
    Family,
    activation_name,
    find_family,
    twice_split,
)
from weaver.models.ffns import Ffns, SplitFfns, StockFfns
from weaver.models.hf import model_class, register
from weaver.models.intake import (
    TOKENIZER_FILES,
    check_shapes,
    library_errors,
    load_tokenizer,
    model_type_of,
    read_config,
)
from weaver.models.locate import locate
from weaver.models.sites import AnyShape, Site, layer_shapes
from weaver.models.tensors import FLOAT32, TensorFiles, stored_dtype

# Tensors that are no parameters.
_BUFFERS = (FLOAT32, ".router.balance_bias")
# Configuration entries that say where and by what it was read, not what the model is.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path")


class Checkpoint(TensorFiles):
    """The folder of a model to convert: configuration, tokenizer, and tensors by name.

    Its FFNs are numbered, see ``weaver.models.sites``: by layer in a dense model, expert by expert
    in one that is a Mixture of Experts already.

    Raises:
        WeaverError: no such model, not safetensors, damaged, of an unknown family, or one whose
            experts are split already.
    """

    def __init__(self, model: ModelConfig, device: torch.device = CPU) -> None:
        self.model = model
        self.device = device
        self.folder = locate(model)
        self.config: PreTrainedConfig = self._load_config()
        self.family: Family = find_family(self.config.model_type, model=model.path)
        self._check_not_quantised()
        self.activation = activation_name(
            getattr(self.config, self.family.activation_field), model=model.path
        )
        super().__init__(self.folder, self.family, int(self.config.num_hidden_layers))
        self._check_layers()
        converted = self.config.model_type.startswith(CONVERTED_PREFIX)
        self.ffns: Ffns = SplitFfns(self) if converted else StockFfns(self)
        self._check_ffn_names()
        self.sites: tuple[Site, ...] = self.ffns.sites
        self._check_shapes()

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_sites(self) -> int:
        """FFNs of the model; its layers, if it is dense."""
        return len(self.sites)

    @property
    def is_moe(self) -> bool:
        """Whether it is a Mixture of Experts before the conversion."""
        return bool(self.ffns.inner_layers)

    @property
    def intermediate_size(self) -> int:
        """Neurons of the largest FFN."""
        return max(self.neurons(site) for site in range(self.num_sites))

    def neurons(self, site: int) -> int:
        """F of one FFN."""
        return self.dense_shape(site).num_shared_neurons

    def dense_shape(self, site: int) -> LayerShape:
        """Size and biases of one FFN before the conversion, all of its neurons shared."""
        return self.ffns.dense_shape(self.sites[site])

    def dense_ffns(self) -> list[DenseFfnSize]:
        """Every FFN before the conversion, with the share of the tokens that reach it."""
        return [
            DenseFfnSize(self.dense_shape(site.number), self.ffns.share(site))
            for site in self.sites
        ]

    def outer_flops(self) -> int:
        """FLOPs per token of the routers that a MoE model has: 2 per entry of their matrices."""
        prefixes = tuple(self.ffns.prefix(layer) for layer in self.ffns.inner_layers)
        names = [n for n in self.names() if n.startswith(prefixes) and not self.is_ffn(n)]
        shapes = [self.shape(name) for name in names]
        return sum(2 * math.prod(shape) for shape in shapes if len(shape) == 2)

    def layer_sites(self, layer: int) -> list[Site]:
        """The FFNs of one decoder layer."""
        return [site for site in self.sites if site.layer == layer]

    def layer_shapes(self, shapes: Sequence[LayerShape]) -> list[AnyShape]:
        """Shapes of the converted layers, from those of the converted FFNs."""
        return layer_shapes(self.sites, shapes, self.ffns.outer)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype most weights are stored in, read from the first FFN."""
        return self.tensor(self.ffns.gate_name(self.sites[0])).dtype

    def resolve_dtype(self, name: DtypeName) -> torch.dtype:
        """``auto`` is the checkpoint's own dtype."""
        return self.dtype if name == "auto" else DTYPES[name]

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
        """Whether a tensor belongs to an FFN that is split; routers of a MoE model do not."""
        prefix = f"{self.family.layers}."
        layer, _, inside = name.removeprefix(prefix).partition(".")
        ffn, _, rest = inside.partition(".")
        return (
            name.startswith(prefix) and ffn == self.family.ffn and self.ffns.owns(int(layer), rest)
        )

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor outside the FFNs, as a model of a dtype has it; see ``stored_dtype``."""
        return self.tensor(name).to(stored_dtype(name, dtype))

    def layer_state(self, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """State dict of one decoder layer without its FFNs, on the device."""
        prefix = self.layer_prefix(layer)
        return {
            name.removeprefix(prefix): self.cast(name, dtype).to(self.device)
            for name in self.layer_names(layer)
            if not self.is_ffn(name)
        }

    def ffn(self, site: int, dtype: torch.dtype) -> GluWeights:
        """One FFN, by its number, neuron j in row j of every matrix, on the device."""
        weights = self.ffns.weights(self.sites[site]).to(dtype, self.device)
        return replace(weights, normed_output=self.family.normed_output)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            WeaverError: the folder holds none that transformers can load.
        """
        return load_tokenizer(self.folder, trust_remote_code=self.model.trust_remote_code)

    def total_parameters(self) -> int:
        """Parameters of the model, a tied output head counted once."""
        names = [name for name in self.names() if not name.endswith(_BUFFERS)]
        if getattr(self.config, "tie_word_embeddings", False):
            names = [name for name in names if name != "lm_head.weight"]
        return sum(math.prod(self.shape(name)) for name in names)

    def identity(self, known: ModelIdentity | None = None) -> ModelIdentity:
        """Digests of the weights and the tokenizer.

        Args:
            known: an earlier identity; if the sizes and times of the weight files and of
                ``config.json`` agree, its digest is taken over.
        """
        files = {
            path.name: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in [*sorted(self._paths()), self.folder / "config.json"]
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
        weights = {path.name: file_digest(path) for path in self._paths()}
        return text_digest(canonical_json([json.loads(json.dumps(config, default=str)), weights]))

    def _tokenizer_digest(self) -> str:
        digest = hashlib.sha256()
        for name in (*TOKENIZER_FILES, "tokenizer_config.json"):
            path = self.folder / name
            if path.is_file():
                digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def _load_config(self) -> PreTrainedConfig:
        register()
        model_type = model_type_of(self.folder)
        # Before AutoConfig, which does not know types of the future.
        find_family(model_type, model=self.model.path)
        config = read_config(self.folder, trust_remote_code=self.model.trust_remote_code)
        layers = getattr(config, "weaver", {}).get("layers", ())
        if any("experts" in entry for entry in layers):
            raise twice_split(self.model.path)
        return config

    def _check_layers(self) -> None:
        """As many layers as the configuration says; heads that predict further tokens aside."""
        prefix = f"{self.family.layers}."
        found = self.stored_layers()
        extra = int(getattr(self.config, "num_nextn_predict_layers", None) or 0)
        if not (self.num_layers and self.num_layers <= found <= self.num_layers + extra):
            raise WeaverError(
                f"{self.folder}: weights of {found} layers, config.json says {self.num_layers}",
                why=f"num_hidden_layers counts the layers that are called {prefix}0 and so on",
                fix="fetch config.json and the weights of the same model",
            )

    def _check_shapes(self) -> None:
        """Sizes of the configuration are those of the tensors, FFNs included."""
        found = {name: self.shape(name) for name in self.names()}
        embeddings = "model.embed_tokens.weight"
        sizes = {embeddings: [self.config.vocab_size, self.config.hidden_size]}
        check_shapes(self.folder, sizes, found)
        for site in self.sites:
            expected = self.ffns.expected_shapes(site, self.hidden_size)
            check_shapes(self.folder, expected, found)
        with (
            library_errors(
                f"{self.folder / 'config.json'}: describes no model of its type",
                "fetch config.json again",
            ),
            torch.device("meta"),
        ):
            skeleton = model_class(self.config, self.family)(self.config)
        tied = set(skeleton.all_tied_weights_keys)
        expected = {
            name: list(tensor.shape)
            for name, tensor in skeleton.state_dict().items()
            if name not in tied and not self._in_ffn(name)
        }
        check_shapes(self.folder, expected, found)

    def _in_ffn(self, name: str) -> bool:
        """Whether a tensor of a model in memory lies in an FFN, whose names on disk may differ."""
        inside = name.removeprefix(f"{self.family.layers}.").partition(".")[2]
        return name.startswith(f"{self.family.layers}.") and inside.startswith(self.family.ffn)

    def _check_ffn_names(self) -> None:
        name = next(
            (name for name in map(self.ffns.gate_name, self.ffns.sites) if name not in self._files),
            None,
        )
        if name is not None:
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
