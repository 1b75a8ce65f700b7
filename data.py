"""Text as rows of seq_len token ids. Training rows never run out, and the place in them can be saved and restored.

`data` lists texts, which take turns row by row. Each is "stdlib", the source of Python's standard library; or a file, folder or
glob of one kind of file, either plain text, each file a document, or rows with a column "text"; or a data set on the hub. Plain
text is read into memory and shuffled; rows are streamed in their order.

Held-out text: the validation or test split of a data set on the hub; 1 in 20 files, if there are 100 or more plain-text files;
otherwise the last twentieth of every document. Its first half is for validation, its second half is the test. It is never trained
on, unless two of the texts share a file.
"""
import glob
import hashlib
import itertools
import os
import sysconfig
from pathlib import Path

import fsspec
import torch
from datasets import Dataset, disable_progress_bars, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node

from lft import InputError

disable_progress_bars()
PILE = "monology/pile-uncopyrighted"
PLAIN = (".txt", ".md", ".py")
READERS = dict.fromkeys(PLAIN, "plain") | {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def find_files(text):
    """The files of a text, in order; each once, however many links lead to it."""
    if text == "stdlib":
        root, skipped = Path(sysconfig.get_path("stdlib")), {"site-packages", "test", "tests", "idle_test"}
        return sorted(file for file in root.rglob("*.py") if not skipped & {*file.relative_to(root).parts})
    pattern = f"{glob.escape(text)}/**" if Path(text).is_dir() else text
    paths = [text] if Path(text).is_file() else glob.glob(pattern, recursive=True)
    return sorted({Path(path).resolve() for path in paths if Path(path).is_file()})


def is_held_out(file, root):
    return int(hashlib.sha256(file.relative_to(root).as_posix().encode()).hexdigest(), 16) % 20 == 0


def documents(text, held_out):
    """The documents of a text, a list or streamed rows with a column "text", and the part of each to keep."""
    files, cut = find_files(text), (0.95, 1) if held_out else (0, 0.95)
    kinds = {READERS.get(Path(file.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix) for file in files}
    if None in kinds or len(kinds) > 1:
        raise InputError(f"use files of one kind (.gz or .zst added or not): {' '.join(READERS)}")
    if kinds == {"plain"}:
        if len(files) >= 100:
            root, cut = os.path.commonpath(files), (0, 1)
            files = [file for file in files if is_held_out(file, root) == held_out]
        return [fsspec.open(str(file), "rt", encoding="utf-8", compression="infer").open().read() for file in files], cut
    if files:
        return load_dataset(*kinds, data_files=[glob.escape(str(file)) for file in files], split="train", streaming=True), cut
    files = {"train": "train/*", "validation": "val.jsonl.zst"} if text == PILE else None  # the hub knows only its train split
    splits = load_dataset(text, data_files=files, streaming=True)
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


def token_rows(text, tokenizer, seq_len, held_out=False, rank=0, world_size=1):
    """One pass over a text: rows {"ids", "document"}, in memory or streamed. Raises InputError if there is none."""
    try:
        texts, cut = documents(text, held_out)
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
        raise InputError(f"cannot read --data {text}, or it has no {part} row of {seq_len} tokens") from error


def training_rows(data, tokenizer, seq_len, seed=0, rank=0, world_size=1):
    """Training rows without end; `state_dict` and `load_state_dict` keep the place. Each process has rows of its own."""
    texts = [token_rows(text, tokenizer, seq_len, False, rank, world_size) for text in data]
    for i, rows in enumerate(texts):
        if isinstance(rows, Dataset):
            texts[i] = split_dataset_by_node(rows.shuffle(seed=seed).to_iterable_dataset(), rank, world_size)
    return interleave_datasets([rows.repeat(None) for rows in texts])


def take(rows, n):
    """The ids of the next n rows: (n, seq_len)."""
    return torch.tensor([row["ids"] for row in itertools.islice(rows, n)])


def held_out_rows(data, tokenizer, seq_len, tokens, test=False):
    """About `tokens` tokens of validation or test text, spread evenly over that half: ids (rows, seq_len), and documents (rows,).

    At most one document of each text is in both halves. Streamed text is cut after 262,144 held-out tokens.
    """
    ids, documents = [], []
    for number, text in enumerate(data):
        rows = token_rows(text, tokenizer, seq_len, held_out=True)
        rows = list(rows if isinstance(rows, Dataset) else rows.take(262_144 // seq_len))
        rows = rows[len(rows) // 2 :] if test else rows[: len(rows) // 2]
        if not rows:
            raise InputError(f"{text} has fewer than two held-out rows of {seq_len} tokens: use more text or shorter rows")
        n = min(max(1, tokens // (len(data) * seq_len)), len(rows))
        for i in torch.linspace(0, len(rows) - 1, n).long().tolist():
            ids.append(rows[i]["ids"])
            documents.append(number * 10**9 + rows[i]["document"])
    return torch.tensor(ids), torch.tensor(documents)
