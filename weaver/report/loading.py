"""How an exported model is loaded: the section of its model card."""

from __future__ import annotations

_TRANSFORMERS = """\
The architecture is transformers' own `{model_type}`: no code beside the model is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the folder of this file
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
```
"""
_GGUF = """\
A GGUF file of the architecture `glm4moe`, for llama.cpp and what is built on it.

```bash
llama-cli -m {file} -p "The sea is"
```
"""
_REMOTE = """\
The architecture is weaver's own. With `pip install weaver-moe` and `import weaver` it runs on
weaver's kernels; without them, on the code that lies beside it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the folder of this file
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
```
"""


def stock_loading(model_type: str) -> str:
    """Of a stock architecture."""
    return _TRANSFORMERS.format(model_type=model_type)


def gguf_loading(file: str) -> str:
    """Of a GGUF file."""
    return _GGUF.format(file=file)


def remote_code_loading() -> str:
    """Of weaver's own type with its code beside it."""
    return _REMOTE
