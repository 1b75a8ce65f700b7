"""Text as rows of seq_len token ids. Training rows never end, and the place in them can be saved and restored.

`data` is "stdlib", the source of the running Python's standard library; a text file, or a glob of them; or a data set with
a column "text", on the hub or in a folder, or its files (.jsonl, .parquet or .csv, compressed or not).

Held-out text is never trained on. Of the standard library it is 1 file in 20; of a data set its validation or test split;
of all else the last twentieth of each document. Of the held-out rows every other one is for validation, which settings may
be chosen by; the rest are for the test, which is reported.
"""
import glob
import hashlib
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from datasets.distributed import split_dataset_by_node

from lft import UNREADABLE, InputError, first_line

disable_progress_bars()

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # of the library, by a file's suffix


def stdlib_texts(held_out):
    """The files of the standard library, tests left out; 1 in 20, by a hash of its path, is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not any(part in ("site-packages", "test", "tests") or part.endswith("_test") for part in name.parts):
            if (int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 20 == 0) == held_out:
                yield path.read_text(encoding="utf-8", errors="replace")


def kinds_of(paths):
    """The readers that files want, by their suffixes: of the library's for rows, or "text"."""
    return {next((READERS[suffix] for suffix in Path(path).suffixes if suffix in READERS), "text") for path in paths}


def open_text(data, held_out):
    """The documents of `data`, rows with a column "text", and whether each is still to be cut into its two parts."""
    if data == "stdlib":
        return Dataset.from_dict({"text": list(stdlib_texts(held_out))}), False
    files = sorted(path for path in glob.glob(data, recursive=True) if Path(path).is_file())
    if len(kinds_of(files)) > 1:
        raise InputError(f"data {data} names files of several kinds: give those of one")
    if kinds_of(files) == {"text"}:
        return Dataset.from_dict({"text": [Path(path).read_text(encoding="utf-8") for path in files]}), True
    if files:
        (kind,) = kinds_of(files)
        return load_dataset(kind, data_files=files, split="train", streaming=True), True
    books = any(Path(data).rglob("*.txt")) and kinds_of(Path(data).rglob("*.*")) == {"text"}
    as_text = {"sample_by": "document"} if books else {}  # or each line would be a document
    splits = load_dataset(data, streaming=True, **as_text)
    for name, file in (("validation", "val.*"), ("test", "test.*")):
        if name in splits:
            return splits[name if held_out else "train"], False
        try:  # the Pile's folder train/ hides these files beside it
            hidden = load_dataset(data, data_files=file, split="train", streaming=True, **as_text)
            return hidden if held_out else splits["train"], False
        except FileNotFoundError:
            continue
    return splits["train"], True


def pack(rows, numbers, tokenizer, seq_len, part):
    """Join documents, each closed by the end-of-text token, and cut them into rows of seq_len tokens.

    part: the slice of each document to keep, (begin, end) as shares of its length. Beside its "ids" each row has the number of
    the "document" in which it begins.
    """
    texts = {number: text[int(part[0] * len(text)) : int(part[1] * len(text))] for number, text in zip(numbers, rows["text"]) if text is not None}
    ids, documents = [], []
    for number, tokens in zip(texts, tokenizer([*texts.values()], verbose=False)["input_ids"] if texts else []):
        ids += [*tokens, tokenizer.eos_token_id]
        documents += [number] * (len(tokens) + 1)
    starts = range(0, len(ids) - seq_len + 1, seq_len)
    return {"ids": [ids[i : i + seq_len] for i in starts], "document": [documents[i] for i in starts]}


def token_rows(data, tokenizer, seq_len, held_out=False, rank=0, world_size=1):
    """One pass over `data`: rows {"ids": seq_len token ids, "document": number}, in memory or streamed.

    rank, world_size: of several processes each gets rows of its own. Raises InputError if there is no such text, or less than
    one row of it.
    """
    try:
        rows, whole = open_text(data, held_out)
        if isinstance(rows, Dataset):
            batch_size = None  # all documents at once
        else:
            rows, batch_size = split_dataset_by_node(rows.select_columns("text"), rank, world_size), 1000
        part = ((0.95, 1) if held_out else (0, 0.95)) if whole else (0, 1)
        options = {"tokenizer": tokenizer, "seq_len": seq_len, "part": part}
        rows = rows.map(pack, batched=True, batch_size=batch_size, with_indices=True, remove_columns=["text"], fn_kwargs=options)
        for _ in rows:  # there is a row at least
            return rows
    except UNREADABLE as error:
        raise InputError(
            f'no text at {data}: give "stdlib", text files in UTF-8, or a data set in reach that has a column "text" '
            f"({first_line(error)})"
        ) from error
    raise InputError(f"data {data} holds less than one {'held-out' if held_out else 'training'} row of {seq_len} tokens: give more text")


def training_rows(data, tokenizer, seq_len, seed=0, rank=0, world_size=1):
    """Training rows without end; text that is held in memory is shuffled once. `state_dict` and `load_state_dict` keep the place."""
    rows = token_rows(data, tokenizer, seq_len, False, rank, world_size)
    if isinstance(rows, Dataset):
        rows = split_dataset_by_node(rows.shuffle(seed=seed).to_iterable_dataset(), rank, world_size)
    return rows.repeat(None)


def held_out_rows(data, tokenizer, seq_len, tokens, test=False):
    """About so many held-out tokens, for validation or for the test: ids (rows, seq_len), and each row's document (rows,).

    Of text in memory they are spread over the whole of it; of a data set they are the first.
    """
    wanted, rows = max(1, tokens // seq_len), token_rows(data, tokenizer, seq_len, held_out=True)
    rows = list(rows if isinstance(rows, Dataset) else rows.take(2 * wanted))[int(test) :: 2]
    if not rows:
        raise InputError(f"data {data} holds one held-out row of {seq_len} tokens, which is for validation: give more text")
    rows = [rows[i] for i in torch.linspace(0, len(rows) - 1, min(wanted, len(rows))).long()]
    return torch.tensor([row["ids"] for row in rows]), torch.tensor([row["document"] for row in rows])
