"""Tests of the five scripts, each against an independent truth: a closed form, the library's own output or a loop by hand.

    python -m pytest -q test_lft.py

KILLS=50 in the environment kills the run of `test_killed_run_resumes_exactly` that often (default 4).
"""
import contextlib
import copy
import functools
import gzip
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test waits for the network

import numpy
import pytest
import torch
import transformers
import zstandard
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

import data
import eval_kl
import lft
import train_fm
import train_fw

HERE = Path(__file__).parent
GQA = {"num_key_value_heads": 2}
FAMILIES = {
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "llama": ("Llama", GQA | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", GQA | {"sliding_window": 8}),
    "qwen2": ("Qwen2", GQA),
    "qwen3": ("Qwen3", GQA | {"head_dim": 16}),
    "phi3": ("Phi3", GQA),
    "starcoder2": ("Starcoder2", GQA),
    "olmo": ("Olmo", GQA),
}
UNFIT = {  # each with the first layer that does not fit
    "gemma2: norms after the branches": ("Gemma2", GQA | {"head_dim": 8}, 1),
    "granite: a scaled residual": ("Granite", {"residual_multiplier": 0.5}, 1),
    "qwen3-moe: every other layer has experts": ("Qwen3Moe", GQA | {"head_dim": 8, "decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2}, 2),
}
SPANS = [(1, 4), (0, 6), (5, 6)]


def random_teacher(family="neox", **options):
    """A small model with random weights, large enough that every part of a layer matters."""
    name, more = (FAMILIES | UNFIT)[family][:2]
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    others = {"max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes | others | more | options)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype()).eval().requires_grad_(False)
    for name, weight in teacher.named_parameters():
        if name.endswith("bias") or "norm" in name:  # the library starts them at 0 and 1, where mistakes do not show
            weight += 0.2 * torch.randn_like(weight)
    return teacher


@torch.no_grad()
def randomize(velocity):
    """Make all weights of a velocity matter: its gates and shifts start at zero."""
    torch.manual_seed(1)
    for weight in velocity.parameters():
        weight += 0.1 * torch.randn_like(weight)
    return velocity.eval()


def student_of(teacher, start, end, solver="midpoint", k=1):
    """A student with a random flow."""
    torch.manual_seed(2)
    student = lft.LFTForCausalLM(lft.LFTConfig(teacher.config.to_dict(), start, end, solver, k, "a teacher"), teacher).eval()
    randomize(student.flow.velocity)
    return student.requires_grad_(False)


def layers_of(model):
    return model.get_decoder().layers


def call_of(layer, model, ids):
    """What the library calls a layer with, and what it returns: state, context, output."""
    seen = []
    handle = layer.register_forward_hook(lambda _, args, context, out: seen.append((args[0], context, out)), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


def double_kl(teacher_logits, logits):
    """KL(teacher || student) of each token, in double precision."""
    p, q = (each.double().softmax(-1) for each in (teacher_logits, logits))
    return (p * (p / q).log()).sum(-1)


def is_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="session")
def small():
    return random_teacher()


@pytest.fixture(scope="session")
def tokenizer():
    return lft.load_teacher("tiny_teacher")[1]


@pytest.fixture
def ids():
    return torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- The velocity and the training pair


@pytest.mark.parametrize("family", FAMILIES)
def test_velocity_starts_as_the_layer(ids, family):
    teacher = random_teacher(family)
    for number, t in ((0, 0.0), (2, 0.37), (5, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1))):
        x, context, expected = call_of(layers_of(teacher)[number], teacher, ids)
        close(x + lft.VelocityBlock(layers_of(teacher)[number])(x, t, **context), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_pair_equals_library_states(ids, family):
    teacher = random_teacher(family)
    norm = getattr(teacher.get_decoder(), "final_layer_norm" if "neox" in family else "norm")
    states = teacher(ids, output_hidden_states=True).hidden_states
    for start, end in ((0, 1), (1, 4), (2, 6), (0, 6)):
        x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, end), ids, start)
        assert torch.equal(x0, states[start])
        assert torch.equal(x1 if end < 6 else norm(x1), states[end])  # the library's last state is after the norm
        expected = call_of(layers_of(teacher)[start], teacher, ids)[1]
        assert is_equal({name: context[name] for name in ("attention_mask",)}, {"attention_mask": expected["attention_mask"]})


@pytest.mark.parametrize("family", ["neox", "neox-sequential"])
def test_velocity_is_the_formula(ids, family):
    """α1·attention(γ1·LN1(x) + β1) + α2·MLP(γ2·LN2(y) + β2), with one time per sequence."""
    teacher, times = random_teacher(family), [0.1, 0.3, 0.9]
    layer = layers_of(teacher)[2]
    velocity = lft.VelocityBlock(layer)
    randomize(velocity.time_mlp)
    x, context, _ = call_of(layer, teacher, ids)
    first, _, last = velocity.time_mlp
    together = velocity(x, torch.tensor(times).view(3, 1, 1), **context)
    for i, t in enumerate(times):
        angles = t * torch.tensor([1000 ** (i / 63) for i in range(64)])
        hidden = torch.nn.functional.silu(first.weight @ torch.cat([torch.sin(angles), torch.cos(angles)]) + first.bias)
        b1, g1, a1, b2, g2, a2 = (last.weight @ hidden + last.bias).view(6, 32) + torch.tensor([0, 1, 1, 0, 1, 1])[:, None]
        attention = a1 * layer.attention(g1 * layer.input_layernorm(x) + b1, **context)[0]
        y = x if family == "neox" else x + attention
        expected = attention + a2 * layer.mlp(g2 * layer.post_attention_layernorm(y) + b2)
        close(velocity(x, t, **context), expected, atol=1e-3, rtol=1e-3)  # sin(1000 t) in single precision
        close(together[i], expected[i], atol=1e-3, rtol=1e-3)
        assert (together[i - 1] - expected[i - 1]).abs().max() > 0.1  # time matters


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2)])
def test_solver_order(solver, order):
    def velocity(x, t):  # dx/dt = (1 + 2t) x is solved by x(t) = x(0) exp(t + t²)
        return (1 + 2 * t) * x

    x0, errors = torch.tensor([[1.0], [-0.5]], dtype=torch.float64), []
    for k in (64, 128, 256):
        x1 = lft.integrate(velocity, x0, [i / k for i in range(k + 1)], solver)
        errors.append((x1 - x0 * math.exp(2)).abs().max().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


# ---- The span replaced


@pytest.mark.parametrize("family", ["neox", "mistral", "qwen2"])
def test_skip_equals_rebuilt_model(ids, family):
    teacher = random_teacher(family)
    for start, end in ((0, 2), (2, 5), (4, 6)):
        rebuilt = random_teacher(family, num_hidden_layers=6 - (end - start))
        weights = {name: weight for name, weight in teacher.state_dict().items() if ".layers." not in name}
        prefix = next(name.split(".layers.")[0] for name in teacher.state_dict() if ".layers." in name)
        for new, old in enumerate([*range(start), *range(end, 6)]):
            for name, weight in layers_of(teacher)[old].state_dict().items():
                weights[f"{prefix}.layers.{new}.{name}"] = weight
        rebuilt.load_state_dict(weights)
        skipping, how = lft.replace_span(teacher, start, end), {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(skipping(ids).logits, rebuilt(ids).logits) and skipping.config.to_dict() == rebuilt.config.to_dict()
        assert torch.equal(skipping.generate(ids, **how), rebuilt.generate(ids, **how))


def test_teacher_is_shared_and_untouched(small, ids):
    before, logits, layers = lft.copy.deepcopy(small.state_dict()), small(ids).logits, list(small.gpt_neox.layers)
    student = student_of(small, 1, 4, "euler", 2)
    student(ids), lft.replace_span(small, 0, 4)(ids)
    assert is_equal(dict(before), dict(small.state_dict())) and torch.equal(small(ids).logits, logits)
    assert [*small.gpt_neox.layers] == layers and small.config.num_hidden_layers == 6
    assert [layer.attention.layer_idx for layer in layers] == [*range(6)]
    theirs = {id(weight) for weight in small.parameters()}
    own = {name for name, weight in student.named_parameters() if id(weight) not in theirs}
    assert own == {f"model.gpt_neox.layers.1.velocity.{name}" for name, _ in student.flow.velocity.named_parameters()}


def test_later_teacher_settings_do_not_reach_the_student(ids):
    teacher = random_teacher()
    student = student_of(teacher, 1, 4, "euler", 2)
    logits = student(ids).logits
    teacher.set_attn_implementation("eager")  # its masks mean something else: a flow that followed would see the future
    assert torch.equal(student(ids).logits, logits)
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("sdpa")
    close(student(ids).logits, logits)


@pytest.mark.parametrize("start, end", [(3, 3), (4, 2), (-1, 2), (0, 7)])
def test_span_outside_the_model_is_refused(small, start, end):
    for replace in (lft.replace_span, student_of):
        with pytest.raises(lft.InputError, match="6 layers"):
            replace(small, start, end)


@pytest.mark.parametrize("end", [4, 6])
@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_student_equals_a_walk_by_hand(small, ids, solver, end):
    """The flow in three equal steps, then the layers after the span."""
    student = student_of(small, 2, end, solver, 3)
    x, context, _ = call_of(small.gpt_neox.layers[2], small, ids)
    for t in (0.0, 1 / 3, 2 / 3):
        slope = student.flow.velocity(x, t, **context)
        if solver == "midpoint":
            slope = student.flow.velocity(x + slope / 6, t + 1 / 6, **context)
        x = x + slope / 3
    for layer in small.gpt_neox.layers[end:]:
        x = layer(x, **context)
    close(student(ids).logits, small.get_output_embeddings()(small.gpt_neox.final_layer_norm(x)))


def test_solver_and_k_of_the_configuration_are_used(small, ids):
    student = student_of(small, 1, 4, "midpoint", 3)
    seen = [student(ids, use_cache=False).logits]
    for solver, k in (("euler", 3), ("euler", 1), ("midpoint", 1)):
        student.config.solver, student.config.k = solver, k
        seen.append(student(ids).logits)
        assert torch.equal(seen[-1], student_of(small, 1, 4, solver, k)(ids).logits)
    assert all((one - two).abs().max() > 1e-3 for one, two in itertools.combinations(seen, 2))


def test_student_in_bfloat16_is_near(small, ids):
    student = student_of(small, 1, 4, "midpoint", 3)
    expected = student(ids).logits
    half = copy.deepcopy(student).to(torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.1 * expected.norm()
    student.flow.velocity.time_mlp[0].weight.data = student.flow.velocity.time_mlp[0].weight.char()  # as 8-bit loading stores it
    student.flow.velocity.time_mlp[0].forward = lambda x: torch.zeros(*x.shape[:-1], 128, dtype=x.dtype)
    assert student(ids).logits.isfinite().all()


def test_gradient_checkpointing_keeps_the_gradients(ids):
    gradients, evaluations = [], []
    for checkpointing in (False, True):
        student = student_of(random_teacher(), 1, 4, "midpoint", 2).train().requires_grad_(True)
        if checkpointing:
            student.activation_checkpointing_enable()
        student.flow.velocity.register_forward_pre_hook(lambda *_: evaluations.append(checkpointing))
        student(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([weight.grad for weight in student.parameters()])
    assert evaluations.count(False) == 4 and evaluations.count(True) == 8  # computed again in the backward pass
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


# ---- The KV cache


class TwoAttentions(lft.VelocityBlock):
    """A velocity of two blocks, one after the other."""

    def __init__(self, layer):
        super().__init__(layer)
        self.second = lft.VelocityBlock(layer)

    def forward(self, x, t, **context):
        first = super().forward(x, t, **context)
        return first + self.second(x + first, t, **context)


def cached_logits(model, ids, cache):
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([11, 1, 1, 7], dim=1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_uncached(ids, family):
    teacher = random_teacher(family)
    for start, end, solver, k in ((1, 5, "midpoint", 2), (0, 1, "midpoint", 3), (4, 6, "euler", 8), (2, 6, "euler", 1)):
        student = student_of(teacher, start, end, solver, k)
        expected = student(ids, use_cache=False).logits
        for cache in (DynamicCache(config=student.config.get_text_config()), DynamicCache()):
            close(cached_logits(student, ids, cache), expected)
        first = student(ids[:, :11])  # the library makes a cache by default
        close(student(ids[:, 11:], past_key_values=first.past_key_values).logits, expected[:, 11:])


@pytest.mark.parametrize("growing", [False, True])
def test_two_flows_and_two_attentions_cache_right(small, ids, growing):
    flows = [lft.FlowLayer(randomize(velocity(small.gpt_neox.layers[4])), "midpoint", 2) for velocity in (TwoAttentions, lft.VelocityBlock)]
    model = lft.replace_span(lft.replace_span(small, 3, 5, flows[0]), 0, 2, flows[1]).eval()
    cache = DynamicCache() if growing else DynamicCache(config=model.config)
    close(cached_logits(model, ids, cache), model(ids, use_cache=False).logits)
    assert {layer.get_seq_length() for layer in cache.layers} == {20} and len(cache.layers) == 4 + 7 + 3


@pytest.mark.parametrize("change", [{"solver": "euler"}, {"k": 3}])
@pytest.mark.parametrize("growing", [False, True])
def test_cache_of_another_solver_is_refused(small, ids, change, growing):
    student = student_of(small, 1, 4, "midpoint", 2)
    cache = DynamicCache() if growing else DynamicCache(config=small.config)
    student(ids, past_key_values=cache)
    vars(student.config).update(change)
    with pytest.raises(lft.InputError, match="start a new one"):
        student(ids, past_key_values=cache)


def left_padded(ids, lengths):
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 6}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family, attention", [("neox", "sdpa"), ("neox", "eager"), ("mistral", "sdpa"), ("qwen3", "sdpa")])
def test_greedy_text_equals_uncached_forward_passes(ids, family, attention, cache):
    teacher = random_teacher(family)
    teacher.set_attn_implementation(attention)
    for start, end, solver, k, lengths in ((0, 3, "euler", 2, [20, 20, 20]), (2, 4, "midpoint", 2, [20, 13, 1])):
        student, how = student_of(teacher, start, end, solver, k), {"do_sample": False, "cache_implementation": cache}
        out = student.generate(
            **left_padded(ids, lengths), **how, eos_token_id=None, return_dict_in_generate=True, output_logits=True
        )
        for row, n in enumerate(lengths):
            alone = ids[row : row + 1, 20 - n :]
            for step in range(6):
                logits = student(alone, use_cache=False).logits[:, -1]
                close(out.logits[step][row : row + 1], logits)
                alone = torch.cat([alone, logits.argmax(-1, keepdim=True)], 1)
            assert torch.equal(out.sequences[row, 20:], alone[0, n:])


@pytest.mark.parametrize("how", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_beams_and_sampling_equal_uncached(small, ids, how):
    student, texts = student_of(small, 1, 3, "midpoint", 2), []
    for cache in (True, False):
        torch.manual_seed(0)
        texts.append(student.generate(**left_padded(ids, [20, 13, 7]), use_cache=cache, **how))
    assert torch.equal(*texts) and texts[0].shape[1] > 20


@pytest.mark.parametrize("family", ["neox", "mistral"])  # Mistral's window of 8 tokens is full when drafting begins
@pytest.mark.parametrize("solver, k", [("euler", 1), ("midpoint", 2)])
def test_drafting_keeps_the_teachers_text(ids, family, solver, k):
    """The student drafts for its teacher; a draft is its own greedy continuation, so a right cache gives the same acceptance."""
    teacher, how = random_teacher(family), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    student = student_of(teacher, 2, 6, solver, k)
    for weight, first in zip(student.flow.velocity.parameters(), lft.VelocityBlock(layers_of(teacher)[2]).parameters()):
        weight.copy_(first)  # near the teacher, so that some drafts are accepted
    for row in ids.split(1):
        assert torch.equal(teacher.generate(row, assistant_model=student, **how), teacher.generate(row, **how))
        expected = student.generate(row, **how)
        assert torch.equal(student.generate(row, assistant_model=lft.replace_span(teacher, 3, 6), **how), expected)


def test_two_threads_do_not_mix_their_caches(small, ids):
    """Both threads are held at every evaluation of the velocity until the other arrives."""
    student, barrier, how = student_of(small, 1, 5, "midpoint", 2), threading.Barrier(2, timeout=60), {"do_sample": False}
    rows, texts = ids[:2].split(1), {}
    expected = [student.generate(row, max_new_tokens=8, min_new_tokens=8, **how) for row in rows]
    student.flow.velocity.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])

    def generate(number):
        texts[number] = student.generate(rows[number], max_new_tokens=8, min_new_tokens=8, **how)

    threads = [threading.Thread(target=generate, args=(number,)) for number in (0, 1)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(texts[number], expected[number]) for number in (0, 1)) and not torch.equal(*expected)


# ---- The teacher and the saved student


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer):
    """A small random teacher as a folder, with the tokenizer of tiny_teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher = random_teacher(vocab_size=2048)
    teacher.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, 5], repetition_penalty=1.3, max_new_tokens=9)
    teacher.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def edit_weights(folder, edit):
    """Change the weights in a model's folder in place."""
    weights = load((folder / "model.safetensors").read_bytes())  # not mapped, since the file is replaced
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_teacher_loads_frozen_in_float32(teacher_folder, tmp_path, tokenizer):
    random_teacher(vocab_size=2048).half().save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    teacher, _ = lft.load_teacher(str(tmp_path))
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32} and not teacher.training
    assert not any(weight.requires_grad for weight in teacher.parameters())


@pytest.mark.parametrize("vocabulary, eos, fits", [(2048, "<|endoftext|>", True), (2047, "<|endoftext|>", False), (2048, None, False)])
def test_tokenizer_must_fit(tmp_path, tokenizer, vocabulary, eos, fits):
    random_teacher(vocab_size=vocabulary).save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = eos
    tokenizer.save_pretrained(tmp_path)
    with contextlib.nullcontext() if fits else pytest.raises(lft.InputError, match="tokenizer"):
        lft.load_teacher(str(tmp_path))


def test_integer_weights_are_refused_and_quantization_config_dropped(teacher_folder, monkeypatch):
    teacher, report = random_teacher(vocab_size=2048), {"missing_keys": set(), "unexpected_keys": set()}
    teacher.config.quantization_config = {"quant_method": "fp8"}
    monkeypatch.setattr(lft.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (teacher, report))
    assert "quantization_config" not in lft.load_teacher(str(teacher_folder))[0].config.to_dict()
    teacher.gpt_neox.layers[3].mlp.dense_h_to_4h.weight.data = torch.ones(64, 32, dtype=torch.int8)
    with pytest.raises(lft.InputError, match="integers"):
        lft.load_teacher(str(teacher_folder))


@pytest.mark.parametrize("family", UNFIT)
def test_unfit_layers_are_refused_by_number(family):
    with pytest.raises(lft.InputError, match=f"layer {UNFIT[family][2]} of"):
        lft.check_layers(random_teacher(family), [1, 2, 3])


def test_fitting_layers_are_accepted():
    for family in FAMILIES:
        lft.check_layers(random_teacher(family), [1, 2, 3, 5])
    moe = random_teacher("qwen3-moe: every other layer has experts")
    lft.check_layers(moe, [2, 4])
    with pytest.raises(lft.InputError, match="layer 3 of"):
        lft.check_layers(moe, [2, 4, 3])  # as --init names it


def test_generation_config_is_the_teachers(small, ids, tmp_path):
    """A flow of one layer, untrained, is the teacher: it writes the same text, with the same penalty and stop tokens."""
    teacher = copy.deepcopy(small)
    logits = teacher.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    stops = [logits[0, 22].item(), logits[1, 23].item()]
    teacher.generation_config = GenerationConfig(eos_token_id=stops, repetition_penalty=1.3, max_new_tokens=12, pad_token_id=0)
    student = lft.LFTForCausalLM(lft.LFTConfig(teacher.config.to_dict(), 2, 3, "euler", 1), teacher).eval()
    student.save_pretrained(tmp_path)
    for model in (student, lft.LFTForCausalLM.from_pretrained(tmp_path)):
        assert model.generation_config.to_diff_dict() == teacher.generation_config.to_diff_dict()
        for row in ids.split(1):
            assert torch.equal(model.generate(row), teacher.generate(row))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_student_loads_the_same(ids, family, tmp_path):
    student = student_of(random_teacher(family), 1, 5, "midpoint", 2)
    student.save_pretrained(tmp_path)
    again = lft.LFTForCausalLM.from_pretrained(tmp_path)
    close(again(ids).logits, student(ids).logits, atol=1e-5, rtol=1e-5)
    assert is_equal(dict(student.state_dict()), dict(again.state_dict()))
    if family == "llama":  # its embeddings are tied: stored once, and one tensor again after loading
        assert sum(weight.shape[0] == 97 for weight in load_file(tmp_path / "model.safetensors").values()) == 1
        assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight


# ---- The losses


def recorder(velocity, times):
    """The velocity, noting the times that it is evaluated at."""
    return lambda x, t: times.append(t) or velocity(x, t)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_token_errors_by_hand(power):
    error, x1 = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    by_hand = [[sum(e**2) / 4 / (sum(x**2) / 4) ** (power / 2) for e, x in zip(*rows)] for rows in zip(error, x1)]
    close(eval_kl.token_errors(error, x1, power), torch.tensor(by_hand))


@pytest.mark.parametrize("loss_of", [train_fm.flow_matching_loss, train_fw.flow_walking_loss])
def test_zero_state_gives_a_finite_loss(loss_of):
    x0, x1 = torch.randn(2, 2, 5, 8)
    x1[0, 2] = 0
    weight = torch.ones(8, requires_grad=True)
    loss = loss_of(lambda x, t: weight * x, x0, x1)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert eval_kl.token_errors(x0 - x1, x1, 2).isfinite().all()


def test_flow_matching_loss_where_paths_cross_is_the_conditional_variance():
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 400_000, 1, 1, dtype=torch.float64)  # independent: x_t tells little of where it came from
    # Given x_t, x1 - x0 has mean (2t-1) x_t / (t²+(1-t)²) and variance 1 / (t²+(1-t)²): on average π/2.
    loss = train_fm.flow_matching_loss(lambda x, t: (2 * t - 1) * x / (t**2 + (1 - t) ** 2), x0, x1, token_power=0)
    assert loss.item() == pytest.approx(math.pi / 2, rel=0.01)


def uniform(times):
    """Kolmogorov's test that times are uniform on [0, 1], at a level of 1 %."""
    below = torch.arange(1, len(times) + 1) / len(times)
    return (times.sort().values - below).abs().max() < 1.63 / len(times) ** 0.5


def test_times_are_uniform_and_one_per_sequence():
    x0, times = torch.zeros(20_000, 2, 1), []
    torch.manual_seed(0)
    train_fm.flow_matching_loss(lambda x, t: times.append((x, t)) or x, x0, x0 + 1)
    ((x, t),) = times
    assert torch.equal(x, t.expand_as(x)) and uniform(t.flatten())  # x_t on the path from 0 to 1 is t itself
    times.clear()
    train_fw.flow_walking_loss(recorder(lambda x, t: x, times), x0, x0 + 1, k=4, solver="euler")
    zero, *inner = times
    assert zero == 0 and [t.shape for t in inner] == [(20_000, 1, 1)] * 3
    inner = torch.stack(inner).flatten(1)
    assert (inner.diff(dim=0) > 0).all() and inner.mean(dim=1).tolist() == pytest.approx([1 / 4, 1 / 2, 3 / 4], abs=0.01)
    assert uniform(inner[torch.randint(3, (20_000,)), torch.arange(20_000)])  # one of the three, at random


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_flow_walking_gradient_equals_a_loop_by_hand(double_precision, ids, solver, k):
    teacher = random_teacher()
    velocity, times = randomize(lft.VelocityBlock(teacher.gpt_neox.layers[2])), []
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, 4), ids, 1)
    u = recorder(functools.partial(velocity, **context), times)
    loss = train_fw.flow_walking_loss(u, x0, x1, k=k, solver=solver, token_power=1.5)
    starts, squares = times[:: 1 if solver == "euler" else 2], 0
    assert len(starts) == k and len(times) == k * (1 + (solver == "midpoint"))
    for i in range(3):  # one sequence after another
        x, ends = x0[i : i + 1], [t if isinstance(t, float) else t[i : i + 1] for t in starts] + [torch.ones(1, 1, 1)]
        for t, s in itertools.pairwise(ends):
            slope = velocity(x, t, **context)
            if solver == "midpoint":
                slope = velocity(x + (s - t) / 2 * slope, (s + t) / 2, **context)
            x = x + (s - t) * slope
        squares = squares + ((x - x1[i]).square().mean(-1) / x1[i].square().mean(-1).sqrt() ** 1.5).sum()
    by_hand, weights = squares / x1[..., 0].numel(), list(velocity.parameters())
    torch.testing.assert_close(loss, by_hand)
    for one, two in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(by_hand, weights)):
        close(one, two, atol=1e-6, rtol=1e-6)


def test_hybrid_adds_alpha_times_flow_matching(small, ids):
    """Each part by hand, at the times that the loss drew."""
    velocity, times = randomize(lft.VelocityBlock(small.gpt_neox.layers[2])), []
    x0, x1, context = lft.hidden_pair(lft.trunk_of(small, 4), ids, 1)
    u = functools.partial(velocity, **context)
    hybrid = train_fw.flow_walking_loss(recorder(u, times), x0, x1, k=1, solver="euler", alpha=0.3, token_power=2.0)
    zero, t = times
    walking, matching = x0 + u(x0, zero) - x1, u((1 - t) * x0 + t * x1, t) - (x1 - x0)
    parts = [((error**2).sum(-1) / (x1**2).sum(-1)).mean() for error in (walking, matching)]
    close(hybrid, parts[0] + 0.3 * parts[1])
    assert parts[1] > 0.1 * parts[0]


@pytest.mark.parametrize("end", [4, 6])
def test_logit_term_is_the_kl_between_the_models(double_precision, ids, end):
    """Value and gradient, against student and teacher as whole models."""
    teacher = random_teacher()
    student = student_of(teacher, 1, end, "euler", 1)
    weights = list(student.flow.velocity.requires_grad_(True).parameters())
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, end), ids, 1)
    head = lft.replace_span(teacher, 0, end)
    u, logits = functools.partial(student.flow.velocity, **context), lambda x: head(inputs_embeds=x).logits
    losses = [train_fw.flow_walking_loss(u, x0, x1, logits, 1, "euler", logit_weight=weight) for weight in (2.0, 0.0)]
    kl = double_kl(teacher(ids).logits, student(ids).logits).mean()
    assert kl > 0.01
    close(losses[0] - losses[1], 2 * kl, atol=0)  # the loss takes it in single precision
    given, expected = (torch.cat([g.flatten() for g in torch.autograd.grad(f, weights)]) for f in (losses[0] - losses[1], 2 * kl))
    assert (given - expected).norm() < 1e-4 * expected.norm()


# ---- Text


class Letters:
    """A tokenizer that a test can read: one token per letter."""

    eos_token_id = 0

    def __call__(self, texts, verbose=False):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def letters(rows):
    """The text of rows, with | for the end of a document."""
    return "".join(chr(token) for row in rows for token in row["ids"]).replace("\0", "|")


def text_at(place, held_out=False, **more):
    return letters(data.token_rows(str(place), Letters(), 1, held_out, **more))


def write_text(path, content):
    """Rows with a column "text", given as a list, or plain text; compressed if the file's name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return data.Dataset.from_dict({"text": content}).to_parquet(path)
    if isinstance(content, list):
        content = "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in content)
    compress = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix.lower(), bytes)
    path.write_bytes(compress(content.encode()))


SOURCE = inspect.getsource(textwrap)  # a text that is quickly read


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="session")
def stream(tmp_path_factory):
    """A folder of streamed rows: two files of different sizes, with documents of different lengths."""
    folder, words, chance = tmp_path_factory.mktemp("stream"), SOURCE.split(), random.Random(0)
    lengths = [chance.randint(20, 60) for _ in range(34)]
    texts = [" ".join(words[sum(lengths[:i]) :][:n]) for i, n in enumerate(lengths)]
    write_text(folder / "0.jsonl.zst", texts[:11])
    write_text(folder / "1.jsonl.zst", texts[11:])
    return folder


def test_documents_are_joined_by_end_of_text_and_cut():
    rows = data.pack({"text": ["abc", None, "", "defgh", "ij"]}, [5, 6, 7, 8, 9], Letters(), 4, (0, 1))
    assert letters({"ids": ids} for ids in rows["ids"]) == "abc|defgh|ij" and rows["document"] == [5, 8, 8]


def test_stdlib_split_stays_the_same():
    """tiny_teacher has never seen the held-out files: another split would score it on what it was trained on."""
    train, held_out = (list(data.stdlib_texts(part)) for part in (False, True))
    assert not set(train) & set(held_out) - {""} and 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    assert not any("class TestCase(unittest.TestCase" in text for text in train + held_out)
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "dataclasses.py", "heapq.py"):
        assert (root / name).read_text() in train
    for name in ("asyncio/events.py", "codecs.py", "email/parser.py", "functools.py"):
        assert (root / name).read_text() in held_out


A, B, C, D = "a" * 190, "b" * 10, "c" * 95, "d" * 5  # the last twentieth of each document is held out
PLAIN = {"1.txt": A + B, "2.md": C + D}
ROWS = [A + B, None, C + D]
BOTH = (f"{A}|{C}|", f"{B}|{D}|")


@pytest.mark.parametrize("files, place, train, held_out", [
    (PLAIN, "", *BOTH), (PLAIN, "*.*", *BOTH), (PLAIN, "2.md", f"{C}|", f"{D}|"),
    ({"train.txt": A + B, "test.txt": C + D}, "", *BOTH),
    ({"a.txt": "", "b/notes[1].txt": A + B, "b/c.PY": C + D}, "b", *BOTH), ({"notes[1].txt": A + B}, "notes[1].txt", f"{A}|", f"{B}|"),
    ({"notes[1]/1.txt": A + B, "1.txt": C + D}, "notes[1]", f"{A}|", f"{B}|"),
    ({"1.txt.gz": A + B, "2.txt.zst": C + D}, "", *BOTH), ({"1.TXT.GZ": A + B}, "1.TXT.GZ", f"{A}|", f"{B}|"),
    ({"x.jsonl": ROWS}, "x.jsonl", *BOTH), ({"x.JSONL": ROWS}, "x.JSONL", *BOTH), ({"x[1].jsonl": ROWS}, "x[1].jsonl", *BOTH),
    ({"x.jsonl.gz": ROWS}, "", *BOTH), ({"x.parquet": ROWS}, "x.parquet", *BOTH), ({"x.jsonl.zst": ROWS, "y.txt": ""}, "*.zst", *BOTH),
    ({"train.jsonl": ROWS[:2], "validation.jsonl": ROWS[2:], "dune.json": ROWS[:1]}, "", f"{A}|{A}|{C}|", f"{B}|{B}|{D}|"),
    ({"x.csv": f"id,text\n1,{A + B}\n2,\n3,{C + D}\n"}, "x.csv", *BOTH),
])  # fmt: skip
def test_text_is_read_by_document(tmp_path, files, place, train, held_out):
    for name, content in files.items():
        write_text(tmp_path / name, content)
    sorted_text = lambda text: sorted(text.split("|"))
    assert sorted_text(text_at(tmp_path / place)) == sorted_text(train)
    assert sorted_text(text_at(tmp_path / place, held_out=True)) == sorted_text(held_out)
    rows = list(data.token_rows(str(tmp_path / place), Letters(), 1))
    assert [number for number, _ in itertools.groupby(row["document"] for row in rows)] == sorted({row["document"] for row in rows})
    assert len({row["document"] for row in rows}) == train.count("|")


HUB = {"train/00.jsonl.zst": ["abcd", "efgh"], "train/01.jsonl.zst": ["ijkl"], "val.jsonl.zst": ["mn", "op"], "test.jsonl.zst": ["q"]}


@pytest.mark.parametrize("name, files, train, held_out", [
    (data.PILE, HUB, "abcd|efgh|ijkl|", "mn|op|"),
    ("a/set", {"train.jsonl": ["ab"], "validation.jsonl": ["cd"], "test.jsonl": ["ef"]}, "ab|", "cd|"),
    ("a/set", {"train.jsonl": ["ab"], "test.jsonl": ["ef"]}, "ab|", "ef|"),
    ("a/set", {"train.jsonl": [A + B]}, A + "|", B + "|"),
])  # fmt: skip
def test_hub_data_sets_keep_their_splits(tmp_path, monkeypatch, name, files, train, held_out):
    for file, content in files.items():
        write_text(tmp_path / file, content)
    load_dataset = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda path, **more: load_dataset({name: str(tmp_path)}[path], **more))
    assert text_at(name) == train and text_at(name, held_out=True) == held_out


def test_symlinked_files_count_once(tmp_path):
    write_text(tmp_path / "folder" / "1.txt", A + B)
    (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "2.txt").symlink_to(tmp_path / "folder" / "1.txt")
    assert text_at(tmp_path / "folder") == text_at(tmp_path / "folder" / "**") == f"{A}|"


@pytest.mark.parametrize("name, content", [
    ("x.txt", b""), ("x.txt", b"\x89PNG\xff\xfe\x00" * 100), ("x.jsonl", b""), ("x.jsonl", b"\x89PNG\xff\xfe\x00" * 100),
    ("x.jsonl", b'{"content": "no column of that name"}'), ("x.rst", b"unknown suffix" * 99), ("x.ndjson", b'{"text": "unknown"}' * 99),
    ("x.jsonl.gz", gzip.compress(os.urandom(9999))[:5000]), ("x.jsonl.zst", zstandard.compress(b'{"text": "abcd"}' * 99)[:-9]),
    ("x.txt.gz", gzip.compress(os.urandom(9999))[:5000]), ("x.txt.zst", zstandard.compress(b"abcd" * 99)[:-9]), ("x.parquet", b"PAR1" * 9),
])  # fmt: skip
def test_corrupt_or_unknown_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(lft.InputError, match="--data"):
        data.token_rows(str(tmp_path / name), Letters(), 80)


@pytest.mark.parametrize("other", ["metadata.json", "README.rst", "table.csv"])
def test_mixed_kinds_of_files_are_refused(tmp_path, other):
    write_text(tmp_path / "1.txt", A + B), write_text(tmp_path / other, '{"text": "a"}')
    with pytest.raises(lft.InputError, match="one kind"):
        data.token_rows(str(tmp_path), Letters(), 4)


@pytest.mark.parametrize("streamed", [False, True])
def test_training_rows_come_once_in_a_pass(text, stream, streamed, tokenizer):
    place = str(stream if streamed else text)
    everything = [row["ids"] for row in data.token_rows(place, tokenizer, 32)]

    def taken(n, seed=0, **more):
        return [row["ids"] for row in itertools.islice(data.training_rows(place, tokenizer, 32, seed, **more), n)]

    one, n = taken(len(everything)), len(everything)
    assert n > 30 and sorted(one) == sorted(everything) and taken(2 * n) == one * 2
    assert streamed or (one != everything and taken(n, seed=1) != one)  # plain text is shuffled
    if not streamed:
        shares = [taken(n // 4, rank=rank, world_size=2) for rank in (0, 1)]
        assert [*itertools.chain(*zip(*shares))] == one[: n // 4 * 2]


def test_processes_stream_documents_of_their_own(stream):
    """Of two files each process reads one; of one file each takes every other row."""
    everything, *parts = (text_at(stream, rank=rank, world_size=n) for rank, n in ((0, 1), (0, 2), (1, 2)))
    assert sorted([everything[: len(parts[0])], everything[len(parts[0]) :]]) == sorted(parts) and min(map(len, parts)) > 1000
    everything, *parts = (text_at(stream / "1.jsonl.zst", rank=rank, world_size=n) for rank, n in ((0, 1), (0, 2), (1, 2)))
    assert parts == [everything[::2], everything[1::2]]


@pytest.mark.parametrize("streamed", [False, True])
def test_place_in_the_text_is_kept(text, stream, streamed, tokenizer):
    place = str(stream if streamed else text)
    n = len(list(data.token_rows(place, tokenizer, 32)))
    rows, taken, states = data.training_rows(place, tokenizer, 32), [], []
    for row in itertools.islice(rows, n + 90):  # past the end of a pass
        taken.append(row["ids"])
        states.append(json.dumps(rows.state_dict()))
    for after in (0, 1, 40, n - 2, n - 1, n, n + 20):
        again = data.training_rows(place, tokenizer, 32)
        again.load_state_dict(json.loads(states[after]))
        assert [row["ids"] for row in itertools.islice(again, 60)] == taken[after + 1 : after + 61]


@pytest.mark.parametrize("lengths", [[9], [1, 1], [5, 1, 6, 2, 2], [3] * 10])
def test_validation_and_test_share_at_most_one_document(lengths):
    n, documents = sum(lengths), torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    halves = [data.split_half(torch.arange(n * 4).view(n, 4), documents, 10**6, test=test) for test in (False, True)]
    assert torch.equal(torch.cat([ids for ids, _ in halves]), torch.arange(n * 4).view(n, 4)) and abs(len(halves[0][0]) * 2 - n) < 2
    assert len(set(halves[0][1].tolist()) & set(halves[1][1].tolist())) <= 1
    few, _ = data.split_half(torch.arange(800).view(200, 4), torch.arange(200), 40, test=True)  # ten rows, spread over the half
    assert few[:, 0].tolist() == pytest.approx([400 + 44 * i for i in range(10)], abs=4) and few[0, 0] == 400 and few[-1, 0] == 796
    with pytest.raises(lft.InputError, match="two held-out rows"):
        data.split_half(torch.zeros(1, 4), torch.zeros(1), 10)


# ---- Runs


@pytest.fixture
def options(teacher_folder, text):
    return ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--max-steps", 3, "--device", "cpu"]


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script's main as its command would; returns exit status, standard output and standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
        capsys.readouterr()
        try:
            lft.run_script(module.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed, errors = capsys.readouterr()
        assert printed.isascii()  # a Windows console cannot show more
        return status, printed, "".join(line for line in errors.splitlines(True) if line.startswith(("error:", "usage:", module.__name__)))

    return run


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(train_fm, "autocast", lambda device: contextlib.nullcontext())


@pytest.fixture
def drawn(monkeypatch):
    """The times that the losses of the scripts draw, one tensor for each micro-batch."""
    return record_times(monkeypatch.setattr)


def record_times(setattr):
    times = []
    for module in (train_fm, train_fw):
        name = {train_fm: "flow_matching_loss", train_fw: "flow_walking_loss"}[module]
        setattr(module, name, functools.partial(lambda loss_of, u, *args, **more: loss_of(recorder(u, times), *args, **more), getattr(module, name)))
    return times


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def logged(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def without_speed(lines):
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def listing(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))


def assert_equal_runs(one, two, log=True):
    """The same weights and optimizers, bit for bit, and the same log."""
    checkpoints = [checkpoint_of(run) for run in (one, two)]
    for key in ("options", "step", "trained", "text"):
        assert is_equal(*(checkpoint[key] for checkpoint in checkpoints)), key
    students = [dict(eval_kl.load_student(run).flow.velocity.state_dict()) for run in (one, two)]
    assert is_equal(*students) and is_equal(students[0], dict(checkpoints[0]["trained"][0]))
    if log:
        assert without_speed(logged(one)) == without_speed(logged(two))


def rows_by_hand(tokenizer, seq_len, part):
    """Training text, validation or test rows of SOURCE, which is one document: cut without data.py."""
    cut = int(0.95 * len(SOURCE))
    tokens = tokenizer(SOURCE[:cut] if part == "training" else SOURCE[cut:])["input_ids"] + [0]
    rows = torch.tensor(tokens[: len(tokens) // seq_len * seq_len]).view(-1, seq_len)
    return {"training": rows, "validation": rows[: len(rows) // 2], "test": rows[len(rows) // 2 :]}[part]


def kl_of(teacher, student, rows):
    return double_kl(teacher(rows).logits, student(rows, use_cache=False).logits).mean().item()


@pytest.mark.parametrize("module, solver, k", [(train_fm, "midpoint", 1), (train_fw, "euler", 2)])
def test_run_is_a_model_and_its_scores_are_true(script, options, tmp_path, tokenizer, module, solver, k, teacher_folder, text):
    run, more = tmp_path / "run", ["--solver", solver, "--k", k, "--token-power", 0] if module is train_fw else []
    status, printed, _ = script(module, *options, *more, "--out", run, "--seq-len", 16)
    assert status == 0 and "layers 1..3" in printed and str(run) in printed.splitlines()[-1]
    made = {"checkpoint.pt", "log.jsonl", "config.json", "model.safetensors", "lft.py", "tokenizer.json"}
    assert made <= {path.name for path in run.iterdir()} and not any(path.is_dir() for path in run.iterdir())
    student, (teacher, _) = eval_kl.load_student(run), lft.load_teacher(str(teacher_folder))
    config = student.config
    assert (config.start, config.end, config.solver, config.k, config.teacher) == (1, 4, solver, k, str(teacher_folder))
    assert config.training["tokens"] == 3 * 8 * 16 and config.training["max_steps"] == 3
    assert logged(run)[-1]["held_out_kl"] == pytest.approx(kl_of(teacher, student, rows_by_hand(tokenizer, 16, "validation")), rel=1e-4)

    status, printed, _ = script(eval_kl, run, "--json", tmp_path / "table.json", "--device", "cpu")
    table, rows = json.loads((tmp_path / "table.json").read_text()), rows_by_hand(tokenizer, 16, "test")
    assert status == 0 and (table["start"], table["end"], table["seq_len"], table["tokens"]) == (1, 4, 16, rows.numel())
    assert table["teacher"] == str(teacher_folder) and table["data"] == str(text)
    found = {row["name"]: row["kl"] for row in table["rows"]}
    assert found[f"LFT {solver} x{k}"] == pytest.approx(kl_of(teacher, student, rows), rel=1e-4)
    fit_rows = rows_by_hand(tokenizer, 16, "training")  # all of them, if in another order
    linear = lft.replace_span(teacher, 1, 4, linear_by_hand(teacher, fit_rows.repeat(40, 1)[: 131_072 // 16], 1, 4, k % 2))
    assert found["linear map"] == pytest.approx(kl_of(teacher, linear, rows), rel=0.02)
    for row in table["rows"]:
        shown = [row["kl"], row["perplexity"], row["top1_agreement"], row["parameters"] / 1e6]
        assert re.search("^{} .*{:.4f}.*{:.2f}.*{:.1%}.*{:.2f}".format(re.escape(row["name"]), *shown), printed, re.M)
    *_, other = script(eval_kl, run, "--no-baselines", "--tokens", 32, "--teacher", teacher_folder, "--json", tmp_path / "small.json")
    small = json.loads((tmp_path / "small.json").read_text())
    assert small["tokens"] == 32 and len(small["rows"]) == 2 + 4 * len(lft.SOLVERS)


def test_saved_run_loads_elsewhere(script, options, ids, tmp_path):
    """In a fresh process, in another folder, by transformers alone: the same logits, text, generation settings and tokenizer."""
    assert script(train_fw, *options, "--out", tmp_path / "run")[0] == 0
    student = eval_kl.load_student(tmp_path / "run")
    torch.save((ids, student(ids).logits, student.generate(ids, do_sample=False)), tmp_path / "expected")
    (tmp_path / "elsewhere").mkdir()
    code = """
import importlib.util, torch, transformers
assert importlib.util.find_spec("lft") is None
load = transformers.AutoModelForCausalLM.from_pretrained
try:
    load("../run")
    raise AssertionError("ran code that nobody trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error)
student = load("../run", trust_remote_code=True)
ids, logits, text = torch.load("../expected")
torch.testing.assert_close(student(ids).logits, logits, atol=1e-5, rtol=1e-5)
assert torch.equal(student.generate(ids, do_sample=False), text)
assert student.generation_config.eos_token_id == [0, 5] and student.generation_config.repetition_penalty == 1.3
assert transformers.AutoTokenizer.from_pretrained("../run").decode(5) == "{}"
""".format(AutoTokenizer.from_pretrained(tmp_path / "run").decode(5))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_fork_trains_and_resumes(script, options, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    fork = ModuleType("l1")
    exec(next(block for block in blocks if "def l1_loss" in block), fork.__dict__)
    assert script(fork, *options, "--out", tmp_path / "run")[0] == 0
    assert script(fork, *options, "--out", tmp_path / "run", "--resume", "--max-steps", 4)[0] == 0
    assert checkpoint_of(tmp_path / "run")["step"] == 4 and eval_kl.load_student(tmp_path / "run").config.training["method"] not in ("fm", "fw")


def test_training_brings_the_student_nearer(script, tmp_path, tokenizer, text):
    """A short run on tiny_teacher leaves less than half of the KL of the dropped span."""
    options = ["--teacher", "tiny_teacher", "--data", text, "--start", 4, "--end", 8, "--batch-size", 4, "--seq-len", 64]
    assert script(train_fw, *options, "--out", tmp_path, "--max-steps", 60, "--device", "cpu")[0] == 0
    teacher, _ = lft.load_teacher("tiny_teacher")
    dropped = kl_of(teacher, lft.replace_span(teacher, 4, 8), rows_by_hand(tokenizer, 64, "validation"))
    assert logged(tmp_path)[-1]["held_out_kl"] < 0.5 * dropped


def test_loop_takes_the_steps_by_hand(script, options, tmp_path, in_float32, drawn, teacher_folder, text):
    script(train_fm, *options, "--out", tmp_path, "--max-steps", 4, "--lr", 0.1, "--batch-size", 3, "--seed", 5, "--accumulate", 3)
    trained = dict(eval_kl.load_student(tmp_path).flow.velocity.state_dict())
    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    torch.manual_seed(5)
    velocity = lft.LFTForCausalLM.velocity_class(teacher.gpt_neox.layers[1])
    start = copy.deepcopy(velocity.state_dict())
    names = {"muon": [], "decayed": [], "plain": []}
    for name, weight in velocity.named_parameters():
        names["plain" if weight.ndim < 2 else "decayed" if "time_mlp" in name else "muon"].append(name)
    assert len(names["muon"]) >= 4 and len(names["decayed"]) >= 2
    muon, decayed, plain = ([dict(velocity.named_parameters())[name] for name in names[kind]] for kind in names)
    optimizers = [
        torch.optim.Muon(muon, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decayed, betas=(0.9, 0.95), weight_decay=0.01), torch.optim.AdamW(plain, betas=(0.9, 0.95), weight_decay=0),
    ]  # fmt: skip
    rows, losses = iter(data.training_rows(str(text), tokenizer, 32, seed=5)), []
    for step, times in zip((1, 2, 3, 4), torch.cat(drawn).split(3)):
        x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, 4), torch.tensor([next(rows)["ids"] for _ in range(3)]), 1)
        x_t = (1 - times) * x0 + times * x1
        loss = ((velocity(x_t, times, **context) - (x1 - x0)).square().mean(-1) / x1.square().mean(-1).sqrt()).mean()
        loss.backward()
        norm = sum(w.grad.square().sum() for w in velocity.parameters()).sqrt()
        for w in velocity.parameters():
            w.grad /= max(norm, 1)  # clipped at norm 1
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 * (5 - step) / 4
            optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    line = logged(tmp_path)[-1]
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3) and line["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    # Where the true gradient is 0, as of a bias of the keys, AdamW follows rounding: so groups are compared, not weights.
    for group in names.values():
        moved, apart = (sum((velocity.state_dict()[name] - other[name]).square().sum() for name in group) for other in (start, trained))
        assert moved > 0.001 and apart < 0.001 * moved


def test_seeds_steps_and_micro_batches_draw_their_own_times(script, options, drawn, tmp_path):
    for seed in (0, 1, 2):
        script(train_fm, *options, "--seed", seed, "--accumulate", 2, "--max-steps", 4, "--out", tmp_path / str(seed))
    times = torch.cat(drawn).flatten().tolist()
    assert len(times) == 3 * 4 * 8 and len(set(times)) == len(times) and uniform(torch.tensor(times))
    drawn.clear()
    script(train_fm, *options, "--seed", 1, "--accumulate", 2, "--max-steps", 2, "--out", tmp_path / "again")
    assert torch.cat(drawn).flatten().tolist() == times[32:48]


@pytest.mark.parametrize("module", [train_fm, train_fw])
def test_loss_defaults_are_the_scripts(script, options, tmp_path, monkeypatch, module):
    name, found = {train_fm: "flow_matching_loss", train_fw: "flow_walking_loss"}[module], []
    loss_of = getattr(module, name)

    def both(velocity, x0, x1, logits, **given):
        state = torch.get_rng_state()
        found.append(loss_of(velocity, x0, x1).item())
        torch.set_rng_state(state)
        found.append(loss_of(velocity, x0, x1, logits, **given))
        return found[-1]

    monkeypatch.setattr(module, name, both)
    script(module, *options, "--max-steps", 1, "--out", tmp_path)
    assert found[0] == found[1].item()


def test_options_of_a_loss_reach_it(script, options, in_float32, drawn, tmp_path, teacher_folder, text):
    own = {"k": 2, "solver": "euler", "alpha": 0.5, "logit_weight": 2.0, "token_power": 2.0}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
    script(train_fw, *options, "--max-steps", 1, "--init", "first", "--out", tmp_path, *flags)
    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    ids = torch.tensor([row["ids"] for row in itertools.islice(data.training_rows(str(text), tokenizer, 32), 8)])
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, 4), ids, 1)
    torch.manual_seed(0)
    u = functools.partial(lft.LFTForCausalLM.velocity_class(teacher.gpt_neox.layers[1]), **context)
    zero, inner, t = drawn
    x = x0 + inner * u(x0, zero)
    x = x + (1 - inner) * u(x, inner)
    nmse = lambda error: (error.square().sum(-1) / x1.square().sum(-1)).mean()
    kl = double_kl(*(lft.replace_span(teacher, 0, 4)(inputs_embeds=state).logits for state in (x1, x))).mean()
    expected = nmse(x - x1) + 0.5 * nmse(u((1 - t) * x0 + t * x1, t) - (x1 - x0)) + 2 * kl
    assert logged(tmp_path)[-1]["loss"] == pytest.approx(expected.item(), rel=1e-4) and kl > 0.01


@pytest.mark.parametrize("module, init, start, end, layer", [
    (train_fm, None, 1, 4, 1), (train_fw, None, 0, 5, 2), (train_fm, "middle", 1, 6, 3), (train_fw, "5", 1, 4, 5),
    (train_fw, "first", 0, 3, 0), (train_fm, None, 0, 3, 0), (train_fw, "0", 2, 4, 0), (train_fw, "middle", 0, 1, 0),
])  # fmt: skip
def test_init_names_the_layer_to_start_from(script, options, tmp_path, module, init, start, end, layer, teacher_folder):
    more = ["--init", init] if init else []
    assert script(module, *options, "--start", start, "--end", end, *more, "--max-steps", 1, "--lr", 0, "--out", tmp_path)[0] == 0
    teacher, flow = random_teacher(vocab_size=2048), eval_kl.load_student(tmp_path).flow
    found = [torch.equal(flow.velocity.mlp.dense_h_to_4h.weight, each.mlp.dense_h_to_4h.weight) for each in teacher.gpt_neox.layers]
    assert [*itertools.compress(range(6), found)] == [layer]


def test_defaults_are_those_of_the_paper(script, monkeypatch):
    for module, expected in ((train_fm, ("fm", 6, 12, "first", "midpoint", 1)), (train_fw, ("fw", 6, 18, "middle", "midpoint", 3))):
        called = []
        monkeypatch.setattr(module, "train", lambda *args, **more: called.append((args, more)))
        script(module)
        (((args, _, *given), more),) = called
        solver, k = given or more.values()
        assert (args.method, args.start, args.end, args.init, solver, k) == expected
        assert (args.batch_size, args.lr, args.seed, args.resume, args.accumulate) == (8, 1 / 64, 0, False, 1)


def test_log_says_what_training_did(script, options, tmp_path):
    script(train_fm, *options, "--out", tmp_path, "--max-steps", 25, "--save-every", 22)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 22, 25] and [line["tokens"] for line in lines] == [2560, 5120, 5632, 6400]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([1 / 64 * (26 - n) / 25 for n in (10, 20, 22, 25)])
    assert ["held_out_kl" in line for line in lines] == ["held_out_nmse" in line for line in lines] == [False, False, True, True]


def test_log_grows_while_training(script, options, tmp_path, monkeypatch):
    seen, evaluate = [], train_fm.evaluate
    monkeypatch.setattr(train_fm, "evaluate", lambda *args: seen.append(len(logged(tmp_path))) or evaluate(*args))
    script(train_fm, *options, "--out", tmp_path, "--max-steps", 21)
    assert seen == [2]  # at the only save, after the last step


@pytest.mark.parametrize("steps", [1, 10, 50, 2000, 320_000])
def test_learning_rate_rises_shortly_and_falls_to_nothing(steps):
    lr = [train_fm.learning_rate(step, SimpleNamespace(lr=0.5, max_steps=steps)) for step in range(1, steps + 1)]
    peak = lr.index(max(lr))
    assert peak <= steps / 10 and 0.45 <= lr[peak] <= 0.5 and lr[-1] == pytest.approx(0.5 / steps)
    assert lr[:peak] == sorted(lr[:peak]) and lr[0] <= 0.5 * max(1, peak) / max(1, peak) ** 2 * 1.01
    falls = [high - low for high, low in itertools.pairwise(lr[steps // 10 :])]
    assert falls == pytest.approx([0.5 / steps] * len(falls))


def test_only_matrices_decay_and_time_networks_go_to_adamw(small):
    """With gradients of zero, decay is all that a step does."""
    velocity = TwoAttentions(small.gpt_neox.layers[2])
    randomize(velocity)
    before, optimizers = copy.deepcopy(velocity.state_dict()), train_fm.make_optimizers(velocity)
    taken = {id(weight) for group in optimizers[0].param_groups for weight in group["params"]}
    for name, weight in velocity.named_parameters():
        assert (id(weight) in taken) == (weight.ndim == 2 and "time_mlp" not in name)
        weight.grad = torch.zeros_like(weight)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        optimizer.step()
    for name, weight in velocity.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (0.995 if weight.ndim > 1 else 1))


def test_autocast_follows_the_hardware(monkeypatch):
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "amx_bf16": False})
        with train_fm.autocast(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if has else torch.float32)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_run_trains_the_same(script, options, tmp_path):
    losses = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        assert script(train_fw, *options, "--start", 0, "--end", 5, "--k", 1, "--out", tmp_path / name, "--max-steps", 40, *more)[0] == 0
        losses.append([line["loss"] for line in logged(tmp_path / name)])
    plain, compiled = losses
    assert plain[-1] < 0.9 * plain[0] and compiled == pytest.approx(plain, rel=0.01)


def linear_by_hand(teacher, rows, start, end, power):
    """Weighted least squares of x1 on [x0, 1], over the library's own states, in double precision."""
    states = teacher(rows, output_hidden_states=True).hidden_states
    x0, x1 = (states[i].flatten(0, 1).double() for i in (start, end))
    root = x1.square().mean(-1, keepdim=True).sqrt() ** (-power / 2)  # the square root of each token's weight
    solution = torch.linalg.lstsq(root * torch.cat([x0, torch.ones(len(x0), 1)], 1), root * x1).solution.float()
    linear = eval_kl.LinearLayer(*solution[1:].shape).requires_grad_(False)
    linear.weight.data, linear.bias.data = solution[:-1].T.contiguous(), solution[-1]
    return linear
