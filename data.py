"""Text as rows of seq_len token ids. Training rows never run out, and the place in them can be saved and restored.

`data` names the text: "stdlib", the source of Python's standard library; a file, folder or glob of one kind of file, either plain
text, each file a document, or rows with a column "text"; or a data set on the hub. Plain text is read into memory and shuffled;
rows are streamed in their order.

Held-out text is never trained on: 1 file in 20 of the standard library, the validation or test split of a data set on the hub,
or else the last twentieth of every document. Settings are chosen on its first half, for validation; its second half is the test.
"""
import glob
import hashlib
import os
import sysconfig
from pathlib import Path

import fsspec
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from datasets.distributed import split_dataset_by_node

from lft import InputError

disable_progress_bars()
PILE = "monology/pile-uncopyrighted"
PLAIN = (".txt", ".md", ".py")
READERS = dict.fromkeys(PLAIN, "plain") | {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def stdlib_texts(held_out):
    """The standard library's .py files without its tests; a hash of the path decides which 1 in 20 is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not any(part in ("site-packages", "test", "tests") or part.endswith("_test") for part in name.parts):
            if (int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 20 == 0) == held_out:
                yield path.read_text(encoding="utf-8", errors="replace")


def documents(data, held_out):
    """The documents of `data`, a list of texts or streamed rows with a column "text", and the part of each to keep."""
    if data == "stdlib":
        return list(stdlib_texts(held_out)), (0, 1)
    cut = (0.95, 1) if held_out else (0, 0.95)
    pattern = f"{glob.escape(data)}/**" if Path(data).is_dir() else data
    paths = [data] if Path(data).is_file() else glob.glob(pattern, recursive=True)
    files = sorted({os.path.realpath(path) for path in paths if Path(path).is_file()})  # each once, whatever the links to it
    kinds = {READERS.get(Path(file.lower().removesuffix(".gz").removesuffix(".zst")).suffix) for file in files}
    if None in kinds or len(kinds) > 1:
        raise InputError(f"give files of one kind (.gz or .zst added or not): {' '.join(READERS)}")
    if kinds == {"plain"}:
        return [fsspec.open(file, "rt", encoding="utf-8", compression="infer").open().read() for file in files], cut
    if files:
        return load_dataset(*kinds, data_files=[glob.escape(file) for file in files], split="train", streaming=True), cut
    files = {"train": "train/*", "validation": "val.jsonl.zst"} if data == PILE else None  # the hub knows only its train split
    splits = load_dataset(data, data_files=files, streaming=True)
    held = splits.get("validation", splits.get("test"))
    return (splits["train"], cut) if held is None else (held if held_out else splits["train"], (0, 1))


def pack(rows, numbers, tokenizer, seq_len, cut):
    """Join documents, each closed by the end-of-text token, and cut them into rows; "document" is the one each row starts in."""
    low, high = cut
    texts = {number: text[int(low * len(text)) : int(high * len(text))] for number, text in zip(numbers, rows["text"]) if text}
    ids, owners = [], []
    for number, tokens in zip(texts, tokenizer([*texts.values()], verbose=False)["input_ids"] if texts else []):
        ids += [*tokens, tokenizer.eos_token_id]
        owners += [number] * (len(tokens) + 1)
    starts = range(0, len(ids) - seq_len + 1, seq_len)
    return {"ids": [ids[i : i + seq_len] for i in starts], "document": [owners[i] for i in starts]}


def token_rows(data, tokenizer, seq_len, held_out=False, rank=0, world_size=1):
    """One pass over the text: rows {"ids", "document"}, in memory or streamed. Raises InputError if there is none."""
    try:
        texts, cut = documents(data, held_out)
        options = {"tokenizer": tokenizer, "seq_len": seq_len, "cut": cut}
        if isinstance(texts, list):
            rows = Dataset.from_dict(pack({"text": texts}, range(len(texts)), **options))
        else:  # each process streams documents of its own
            texts = split_dataset_by_node(texts.select_columns("text"), rank, world_size)
            rows = texts.map(pack, batched=True, with_indices=True, remove_columns=["text"], fn_kwargs=options)
        next(iter(rows))
        return rows
    except Exception as error:  # each reader and decompressor has its own kinds
        part = "held-out" if held_out else "training"
        raise InputError(f"cannot read --data {data}, or it has no {part} row of {seq_len} tokens") from error


def training_rows(data, tokenizer, seq_len, seed=0, rank=0, world_size=1):
    """Training rows without end; `state_dict` and `load_state_dict` keep the place. Each process has rows of its own."""
    rows = token_rows(data, tokenizer, seq_len, False, rank, world_size)
    if isinstance(rows, Dataset):
        rows = split_dataset_by_node(rows.shuffle(seed=seed).to_iterable_dataset(), rank, world_size)
    return rows.repeat(None)


def held_out_rows(data, tokenizer, seq_len):
    """All held-out rows, or the first of a stream: ids (rows, seq_len) and the number of each row's document (rows,)."""
    rows = token_rows(data, tokenizer, seq_len, held_out=True)
    rows = list(rows if isinstance(rows, Dataset) else rows.take(262_144 // seq_len))
    return torch.tensor([row["ids"] for row in rows]), torch.tensor([row["document"] for row in rows])


def split_half(ids, documents, tokens, test=False):
    """About so many tokens, spread over the validation or test half of held-out rows; at most one document is in both halves."""
    half = slice(len(ids) // 2, None) if test else slice(0, len(ids) // 2)
    ids, documents = ids[half], documents[half]
    if not len(ids):
        raise InputError("there are fewer than two held-out rows: give more text or a smaller --seq-len")
    spread = torch.linspace(0, len(ids) - 1, min(max(1, tokens // ids.shape[1]), len(ids))).long()
    return ids[spread], documents[spread]
