"""Pretrain the embedded teacher: a 24-layer, width-128 GPT-NeoX on Python source and English.

    make speeches
    .venv/bin/python -m tiny_teacher.pretrain        # into runs/tiny_teacher
    cp runs/tiny_teacher/* tiny_teacher/             # make it the embedded teacher

Pythia-410M's architecture at a 70th of its size, with as many layers, so that a span such as 6 -> 18 means the same on both.
The model grows from 6 to 12 to 24 layers while it trains. That makes skipping three layers cost more at the mean place, on Python
source, than in a model that has 24 layers from the start (README.md).
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

from data import documents, pack
from eval_kl import DEVICES
from train_fm import autocast

OWN = "stdlib", "speeches"  # the training part of these; the rest is the source of packages that requirements.txt installs
TEXTS = "datasets huggingface_hub mpmath networkx numpy pandas pyarrow speeches stdlib sympy torch transformers".split()
VOCABULARY, SEQ_LEN, BATCH_SIZE, WARM_UP = 4096, 256, 64, 100
GROW_AT = 0.25, 0.5  # of the run; each time the number of layers doubles
END_OF_TEXT = "<|endoftext|>"


# ---- 1. The text
def long_lines(document):
    return [line for line in document.splitlines() if len(line) >= 30]


def is_copy(document, held_out_lines):
    """Whether more than a tenth of its long lines also stand in held-out files, as in a vendored copy of one."""
    lines = long_lines(document)
    return sum(line in held_out_lines for line in lines) > len(lines) / 10


def read_text(name, held_out_lines):
    """The training documents of one text, and the part of each to keep; without copies of held-out library files."""
    if name in OWN:
        return documents(name, held_out=False)
    files, cut = documents(f"{sysconfig.get_path('purelib')}/{name}/**/*.py", held_out=False)
    return [file for file in files if not is_copy(file, held_out_lines)], cut


def make_tokenizer(texts):
    """A byte-level BPE, trained on our own texts and on a tenth of the packages' files."""
    bpe = ByteLevelBPETokenizer()
    sample = [document for name, (found, _) in texts.items() for document in found[:: 1 if name in OWN else 10]]
    bpe.train_from_iterator(sample, vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT)


def sequences(found, cut, tokenizer):
    """The documents joined, each closed by the end-of-text token, and cut: ids (sequences, SEQ_LEN)."""
    parts = [found[i : i + 200] for i in range(0, len(found), 200)]  # the ids of all texts as Python numbers would take gigabytes
    rows = [pack({"text": part}, range(len(part)), tokenizer, SEQ_LEN, cut)["ids"] for part in parts]
    return torch.cat([torch.tensor(ids, dtype=torch.int32).view(-1, SEQ_LEN) for ids in rows])


# ---- 2. The optimizers
def make_optimizers(model):
    """Muon for the layers' matrices, AdamW for the rest; only matrices decay."""
    matrices = [weight for weight in model.gpt_neox.layers.parameters() if weight.ndim == 2]
    embeddings = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


# ---- 3. Training
@torch.no_grad()
def grow(model):
    """Replace each layer by two copies that each do half as much, so that the predictions hardly change."""
    layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.gpt_neox.layers for _ in range(2))
    for number, layer in enumerate(layers):
        layer.attention.layer_idx = number
        for weight in (*layer.attention.dense.parameters(), *layer.mlp.dense_4h_to_h.parameters()):
            weight /= 2
    model.gpt_neox.layers, model.config.num_hidden_layers = layers, len(layers)


def batches(rows):
    while True:  # one pass over the text after another, each in an order of its own
        for index in torch.randperm(len(rows), device=rows.device)[: len(rows) // BATCH_SIZE * BATCH_SIZE].view(-1, BATCH_SIZE):
            yield rows[index].long()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", default="runs/tiny_teacher", help="folder to write (default: %(default)s)")
    add("--max-steps", type=int, default=3650, help="optimizer steps of 64 x 256 tokens (default: %(default)s, one pass)")
    add("--lr", type=float, default=8e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights and the order of text (default: %(default)s)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to train (default: %(default)s)")
    args = parser.parse_args()
    held_out_lines = {line for document in documents("stdlib", held_out=True)[0] for line in long_lines(document)}
    texts = {name: read_text(name, held_out_lines) for name in TEXTS}
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(args.out)
    train = torch.cat([sequences(*found, tokenizer) for found in texts.values()]).to(args.device)
    held_out = {name: sequences(*documents(name, held_out=True), tokenizer).to(args.device) for name in OWN}
    print(f"text: {train.numel():,} training tokens", *(f"{ids.numel():,} held out of {name}" for name, ids in held_out.items()))

    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).to(args.device)
    optimizers = make_optimizers(model)
    progress = tqdm(zip(range(1, args.max_steps + 1), batches(train)), total=args.max_steps, mininterval=10)
    for step, ids in progress:
        if step - 1 in [int(share * args.max_steps) for share in GROW_AT]:
            grow(model)
            optimizers = make_optimizers(model)
        with autocast(model.device):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / args.max_steps)) / 2
        lr = args.lr * min(1, step / WARM_UP) * cosine
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 600 == 0 or step == args.max_steps:
            copy.deepcopy(model).half().save_pretrained(args.out)

    model = GPTNeoXForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)  # from float16, as users load it
    for name, rows in held_out.items():
        with torch.no_grad():
            losses = [model(ids.long(), labels=ids.long(), use_cache=False).loss.item() for ids in rows.split(1)]
        print(f"held-out loss on {name}: {sum(losses) / len(losses):.3f} nats per token")


if __name__ == "__main__":
    main()
