"""Texts that sweeps read and that no data folder has as they are: cut, split or sampled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from weaver.artifacts.store import write_text

HELD_OUT_CHARACTERS = 4500
STORIES = 1024


def write_wikitext(data_dir: Path, folder: Path) -> None:
    """WikiText-2's splits as one document each, so that windows are cut from the text as it is."""
    for split in ("valid", "test"):
        text = (data_dir / f"wikitext2/tok.{split}.txt").read_text(encoding="utf-8")
        _write_rows(folder / f"wikitext2_{split}.jsonl", [text])


def split_wikitext(data_dir: Path, folder: Path) -> None:
    """The validation split of WikiText-2, of which the last twentieth is for the guard."""
    text = (data_dir / "wikitext2/tok.valid.txt").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    kept = len(lines) - len(lines) // 20
    write_text(folder / "wikitext2_train.txt", "".join(lines[:kept]))
    write_text(folder / "wikitext2_held_out.txt", "".join(lines[kept:]))


def split_domains(data_dir: Path, folder: Path) -> None:
    """Every domain without its last documents, which become the text that is measured."""
    (folder / "domains").mkdir(exist_ok=True)
    held_out = []
    for path in sorted((data_dir / "domains").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line)["text"] for line in lines]
        kept = len(rows)
        while sum(map(len, rows[kept:])) < HELD_OUT_CHARACTERS:
            kept -= 1
        _write_rows(folder / "domains" / path.name, rows[:kept])
        held_out.append("\n\n".join(rows[kept:]))
    _write_rows(folder / "domains_held_out.jsonl", held_out)


def sample_stories(data_dir: Path, folder: Path) -> None:
    """A copy of a model of 260K parameters and stories that it tells, one sixteenth held out."""
    if (folder / "stories_train.jsonl").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "stories260K-hf"
    shutil.copytree(data_dir / "models" / name, folder / name, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    dense: Any = AutoModelForCausalLM.from_pretrained(folder / name)
    torch.manual_seed(0)
    start_BT = torch.full((STORIES, 1), dense.config.bos_token_id)
    ids_BT: Any = dense.generate(
        start_BT,
        attention_mask=torch.ones_like(start_BT),
        do_sample=True,
        top_k=0,
        min_new_tokens=255,
        max_new_tokens=255,
    )
    stories = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in ids_BT]
    _write_rows(folder / "stories_held_out.jsonl", stories[: STORIES // 16])
    _write_rows(folder / "stories_train.jsonl", stories[STORIES // 16 :])


def _write_rows(path: Path, texts: Iterable[str]) -> None:
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


# By the name of the sweep that reads them.
TEXTS: Mapping[str, Callable[[Path, Path], None]] = {
    "matched": write_wikitext,
    "elements": write_wikitext,
    "recovery": split_wikitext,
    "dive": split_domains,
    "downcycling": sample_stories,
}
