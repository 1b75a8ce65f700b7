"""Pretrain the embedded teacher: a 24-layer, width-128 GPT-NeoX on Python source and English.

    make speeches
    .venv/bin/python -m tiny_teacher.pretrain        # into runs/tiny_teacher
    cp runs/tiny_teacher/* tiny_teacher/             # make it the embedded teacher

Pythia-410M's architecture at a 70th of its size, with as many layers, so that a span such as 6 -> 18 means the same on
both. The model grows from 6 to 12 to 24 layers while it trains. That makes skipping three layers cost more, averaged
over places and on Python source, than in a model that has 24 layers from the start (README.md).
"""

import argparse
import copy
import math
import sysconfig

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from data import load_documents, pack
from loop import autocast, update
from run import DEVICES

OWN = ("stdlib", "speeches")
# The source of packages that requirements.txt installs.
PACKAGES = [
    "datasets",
    "huggingface_hub",
    "mpmath",
    "networkx",
    "numpy",
    "pandas",
    "pyarrow",
    "sympy",
    "torch",
    "transformers",
]
VOCABULARY = 4096
SEQ_LEN = 256
BATCH_SIZE = 64
WARM_UP = 100  # steps
GROW_AT = (0.25, 0.5)  # fractions of the run; each time the number of layers doubles
END_OF_TEXT = "<|endoftext|>"


# ---- 1. The text
def long_lines(document):
    return [line for line in document.splitlines() if len(line) >= 30]


def is_copy(document, held_out_lines):
    """Whether more than a tenth of its long lines also stand in held-out text, as in a vendored copy."""
    lines = long_lines(document)
    return sum(line in held_out_lines for line in lines) > len(lines) / 10


def read_texts():
    """The training documents of each text, without near copies of held-out parts of the library: {name: documents}."""
    held_out_lines = set()
    for document in load_documents("stdlib", held_out=True)["text"]:
        held_out_lines.update(long_lines(document))
    texts = {name: load_documents(name, held_out=False)["text"] for name in OWN}
    for package in PACKAGES:
        documents = load_documents(f"{sysconfig.get_path('purelib')}/{package}/**/*.py", held_out=False)["text"]
        texts[package] = [document for document in documents if not is_copy(document, held_out_lines)]
    return texts


def make_tokenizer(texts):
    """A byte-level BPE, trained on our own texts and on a tenth of the packages' files."""
    sample = []
    for name, documents in texts.items():
        sample.extend(documents if name in OWN else documents[::10])
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sample, vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT)


def windows_of(documents, tokenizer):
    """The documents joined, each closed by the end-of-text token, and cut: ids (windows, SEQ_LEN)."""
    found = []
    for i in range(0, len(documents), 200):  # the ids of a whole text as Python numbers would take gigabytes
        part = documents[i : i + 200]
        ids = pack({"text": part}, range(len(part)), tokenizer, SEQ_LEN)["ids"]
        found.append(torch.tensor(ids, dtype=torch.int32).view(-1, SEQ_LEN))
    return torch.cat(found)


# ---- 2. The optimizers
def make_optimizers(model):
    """Muon for the layers' matrices, AdamW for the rest; only matrices decay."""
    matrices = [weight for weight in model.gpt_neox.layers.parameters() if weight.ndim == 2]
    embeddings = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


# ---- 3. Training
@torch.no_grad()
def grow(model):
    """Replace each layer by two copies that each do half as much, so that the predictions hardly change."""
    layers = nn.ModuleList()
    for layer in model.gpt_neox.layers:
        for weight in (*layer.attention.dense.parameters(), *layer.mlp.dense_4h_to_h.parameters()):
            weight /= 2
        layers.extend([copy.deepcopy(layer), copy.deepcopy(layer)])
    for number, layer in enumerate(layers):
        layer.attention.layer_idx = number
    model.gpt_neox.layers = layers
    model.config.num_hidden_layers = len(layers)


def batches(windows):
    """Batches without end, one pass over the windows after another, each in an order of its own."""
    while True:
        order = torch.randperm(len(windows), device=windows.device)
        for index in order[: len(windows) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            yield windows[index].long()


def learning_rate(step, args):
    """Linear warm-up, then a cosine to a twentieth of the peak."""
    cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / args.max_steps)) / 2
    return args.lr * min(1, step / WARM_UP) * cosine


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", default="runs/tiny_teacher", help="folder to write (default: %(default)s)")
    add(
        "--max-steps",
        type=int,
        default=3650,
        help="optimizer steps of 64 x 256 tokens (default: %(default)s)",
    )
    add("--lr", type=float, default=8e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the weights and the order of text (default: %(default)s)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to train (default: %(default)s)")
    args = parser.parse_args()
    texts = read_texts()
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(args.out)
    train = torch.cat([windows_of(documents, tokenizer) for documents in texts.values()]).to(args.device)
    held_out = {}
    for name in OWN:
        documents = load_documents(name, held_out=True)["text"]
        held_out[name] = windows_of(documents, tokenizer).to(args.device)
        print(f"{held_out[name].numel():,} tokens of {name} held out")
    print(f"{train.numel():,} training tokens")

    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config).to(args.device)
    optimizers = make_optimizers(model)
    progress = tqdm(zip(range(1, args.max_steps + 1), batches(train)), total=args.max_steps, mininterval=10)
    for step, ids in progress:
        if step - 1 in [int(fraction * args.max_steps) for fraction in GROW_AT]:
            grow(model)
            optimizers = make_optimizers(model)
        with autocast(model.device):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update(optimizers, learning_rate(step, args))
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 600 == 0 or step == args.max_steps:
            copy.deepcopy(model).half().save_pretrained(args.out)

    model = GPTNeoXForCausalLM.from_pretrained(args.out, dtype=torch.float32)  # from float16, as users load it
    model = model.to(args.device)
    for name, windows in held_out.items():
        losses = []
        with torch.no_grad():
            for ids in windows.long().split(1):
                losses.append(model(ids, labels=ids, use_cache=False).loss.item())
        print(f"held-out loss on {name}: {sum(losses) / len(losses):.3f} nats per token")


if __name__ == "__main__":
    main()
