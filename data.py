"""Text as windows of token ids, for training and for scoring.

--data names one or more texts, which take turns window by window. A text is "stdlib", the source of Python's standard
library; or a file, folder or glob of plain text (.txt, .md, .py; each file is a document); or a file, folder or glob of
rows with a column "text" (.jsonl, .parquet, .csv); or a data set on the hub. In a folder that holds both, only the
plain text is read, unless it is the README.md of a data set. Plain text is read into memory and shuffled, rows are
streamed in their order.

Held-out text is the validation or test split of the text, if it has one. Otherwise a document is held out if a hash of
its text says so, 1 in 20; so it is on the same side in every text, folder and copy. Plain text as long as a book is
first cut into 100 documents. The first half of the held-out windows is for validation, the second half is the test.
"""

import glob
import hashlib
import itertools
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node

from lft import InputError

PILE = "monology/pile-uncopyrighted"
PILE_FILES = {"train": "train/*", "validation": "val.jsonl.zst"}  # the hub knows only its training split
PLAIN_TEXT = {".txt", ".md", ".py"}
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # of the datasets library
BOOK = 200_000  # characters
HELD_OUT_TOKENS = 262_144  # at most, of each streamed text; half of them for the test

disable_progress_bars()


# ---- 1. Documents
def find_plain_text(text):
    if text == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"site-packages", "test", "tests", "idle_test"}
        return sorted(file for file in root.rglob("*.py") if not left_out.intersection(file.relative_to(root).parts))
    pattern = f"{text}/**" if Path(text).is_dir() else text
    files = map(Path, glob.glob(pattern, recursive=True))
    return sorted(file for file in files if file.suffix in PLAIN_TEXT and file.name != "README.md")


def read_plain_text(files):
    documents = []
    for file in files:
        document = file.read_text(encoding="utf-8")
        size = BOOK
        if len(document) >= BOOK:
            size = len(document) // 100 + 1
        documents.extend(document[start : start + size] for start in range(0, len(document), size))
    return Dataset.from_dict({"text": documents})


def load_splits(text):
    """The splits of a text by name, each of rows with a column "text": plain text in memory, all else streamed."""
    files = find_plain_text(text)
    if files:
        return {"train": read_plain_text(files)}
    for suffix, reader in READERS.items():
        if suffix in Path(text).suffixes:
            return load_dataset(reader, data_files=text, streaming=True)
    return load_dataset(text, data_files=PILE_FILES if text == PILE else None, streaming=True)


def is_on_side(document, held_out):
    digest = hashlib.sha256(document.encode()).digest()
    return (int.from_bytes(digest) % 20 == 0) == held_out


def load_documents(text, held_out):
    """The held-out or the training documents of a text."""
    splits = load_splits(text)
    for name in ("validation", "test"):
        if name in splits:
            return splits[name if held_out else "train"]
    return splits["train"].filter(is_on_side, input_columns="text", fn_kwargs={"held_out": held_out})


# ---- 2. Windows
def pack(documents, numbers, tokenizer, seq_len):
    """Join documents, each closed by the end-of-text token, and cut them into windows of seq_len tokens.

    Every window starts with the beginning-of-text token if the tokenizer adds one: Gemma, for one, needs it.
    """
    first = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    ids = []
    owners = []
    tokenized = tokenizer(documents["text"], add_special_tokens=False, verbose=False)["input_ids"]
    for number, tokens in zip(numbers, tokenized):
        ids.extend([*tokens, tokenizer.eos_token_id])
        owners.extend([number] * (len(tokens) + 1))
    size = seq_len - len(first)
    starts = range(0, len(ids) - size + 1, size)
    return {"ids": [first + ids[i : i + size] for i in starts], "document": [owners[i] for i in starts]}


def read_windows(text, tokenizer, seq_len, held_out=False, rank=0, world_size=1):
    """One pass over a text: rows of "ids", seq_len tokens, and "document", the number of the one they start in.

    Raises InputError if there is not one window.
    """
    try:
        documents = load_documents(text, held_out).select_columns("text")
        if not isinstance(documents, Dataset):  # streamed: each process reads documents of its own
            documents = split_dataset_by_node(documents, rank, world_size)
        options = {"tokenizer": tokenizer, "seq_len": seq_len}
        windows = documents.map(pack, batched=True, with_indices=True, remove_columns=["text"], fn_kwargs=options)
        next(iter(windows))
    except Exception as error:  # each reader and decompressor raises its own kinds
        raise InputError(
            f"cannot read --data {text}, or it has no window of {seq_len} tokens: without a network try --data stdlib"
        ) from error
    return windows


def training_windows(data, tokenizer, seq_len, seed=0, rank=0, world_size=1):
    """Training windows without end, of all texts in turn. `state_dict` and `load_state_dict` keep the position."""
    streams = []
    for text in data:
        windows = read_windows(text, tokenizer, seq_len, False, rank, world_size)
        if isinstance(windows, Dataset):  # in memory: each process takes windows of its own
            windows = split_dataset_by_node(windows.shuffle(seed=seed).to_iterable_dataset(), rank, world_size)
        streams.append(windows.repeat(None))
    return interleave_datasets(streams)


def take(windows, n):
    """The ids of the next n windows: (n, seq_len)."""
    return torch.tensor([window["ids"] for window in itertools.islice(windows, n)])


def held_out_windows(data, tokenizer, seq_len, tokens, test=False):
    """About `tokens` validation or test tokens, spread evenly: ids (windows, seq_len) and documents (windows,).

    Raises InputError if a text has fewer than two held-out windows.
    """
    ids = []
    documents = []
    for text_number, text in enumerate(data):
        windows = read_windows(text, tokenizer, seq_len, held_out=True)
        if not isinstance(windows, Dataset):
            windows = windows.take(HELD_OUT_TOKENS // seq_len)
        windows = list(windows)
        half = len(windows) // 2
        if half == 0:
            raise InputError(f"{text} has fewer than two held-out windows: use more text or a smaller --seq-len")
        windows = windows[half:] if test else windows[:half]
        n = min(len(windows), max(1, tokens // (len(data) * seq_len)))
        for i in torch.linspace(0, len(windows) - 1, n).long().tolist():
            ids.append(windows[i]["ids"])
            documents.append(text_number * 10**9 + windows[i]["document"])
    return torch.tensor(ids), torch.tensor(documents)
