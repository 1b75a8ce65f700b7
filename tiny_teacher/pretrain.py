"""Pretrain the embedded teacher: a 24-layer, width-128 GPT-NeoX on the Python standard library's source.

    python -m tiny_teacher.pretrain                  # 75 minutes on two cores, into runs/tiny_teacher
    cp runs/tiny_teacher/* tiny_teacher/             # make it the embedded teacher

Pythia-410M's architecture at a 77th of its size, with as many layers, so that a span such as 6 -> 18 means the
same on both. It learns from the training files of `--data stdlib` (see data.py); the held-out files are never shown.
"""
import argparse
import copy
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from data import documents, pack

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", default="runs/tiny_teacher", help="folder to write (default %(default)s)")
parser.add_argument("--max-steps", type=int, default=3000, help="optimizer steps of 16 x 256 tokens (default %(default)s)")
parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="seed of weights and order of text (default %(default)s)")
args = parser.parse_args()
torch.manual_seed(args.seed)

END_OF_TEXT = "<|endoftext|>"
bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator(documents("stdlib", held_out=False)[0], vocab_size=2048, special_tokens=[END_OF_TEXT], show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT)
tokenizer.save_pretrained(args.out)


def sequences(texts):
    """The texts joined, each closed by the end-of-text token, and cut: ids (sequences, 256)."""
    return torch.tensor(pack({"text": texts}, range(len(texts)), tokenizer, 256, cut=(0, 1))["ids"])


train, held_out = (sequences(documents("stdlib", part)[0]) for part in (False, True))
print(f"text: {train.numel():,} training tokens, {held_out.numel():,} held out", flush=True)

config = GPTNeoXConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4,
    max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
)
# Eager attention: at this size, in bf16 on a CPU, it is faster than sdpa.
model = GPTNeoXForCausalLM._from_config(config, attn_implementation="eager")
# Muon for the matrices of the layers, AdamW for everything else; scaled so that one learning rate suits both.
matrices = [weight for weight in model.gpt_neox.layers.parameters() if weight.ndim == 2]
others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or ".layers." not in name]
optimizers = [
    torch.optim.Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
]
schedules = [get_cosine_schedule_with_warmup(optimizer, 100, args.max_steps) for optimizer in optimizers]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def held_out_loss():
    """Mean loss of the model on the held-out files, in nats per token."""
    return sum(model(ids, labels=ids, use_cache=False).loss.item() for ids in held_out.split(1)) / len(held_out)


def batches():
    while True:  # one pass over the text after another, each in an order of its own
        for index in torch.randperm(len(train))[: len(train) // 16 * 16].view(-1, 16):
            yield train[index]


progress = tqdm(zip(range(1, args.max_steps + 1), batches()), total=args.max_steps, mininterval=10)
for step, ids in progress:
    with autocast():
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in optimizers + schedules:
        stepper.step()
    model.zero_grad()
    progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if step % 600 == 0 or step == args.max_steps:
        copy.deepcopy(model).half().save_pretrained(args.out)

model = GPTNeoXForCausalLM.from_pretrained(args.out, dtype=torch.float32)  # the fp16 weights that everyone loads
print(f"held-out loss {held_out_loss():.3f} nats per token")
