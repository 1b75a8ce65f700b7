"""Tests, each against an independent truth: a closed form, the library's own output, or a computation by hand.

    python -m pytest -q test_lft.py

The environment variable KILLS says how often the run that is killed at random moments is killed (default 4).
"""
import copy
import functools
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
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: a test of a name on the hub is not to wait for the hub

import gguf
import numpy
import pytest
import torch
import transformers
import zstandard
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM,
    modeling_gguf_pytorch_utils, modeling_utils,
)  # fmt: skip

import data
import eval_kl
import lft
import train_fm
import train_fw
from studies import drafting, massive, results, spans, speed, stored

HERE = Path(__file__).parent
FAMILIES = {
    "neox": ("GPTNeoX", {}),
    "neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
}
UNFIT = {
    "norms after the branches": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
    "windows that differ": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    "a scaled residual": ("Granite", {"residual_multiplier": 0.5}),
}


def random_teacher(family="neox", **options):
    """A small model with random weights, large enough that every part of a layer matters."""
    name, more = (FAMILIES | UNFIT)[family]
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    others = {"max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes | others | more | options)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype()).eval().requires_grad_(False)
    for name, weight in teacher.named_parameters():
        if name.endswith("bias") or "norm" in name:  # which the library starts at 0 and 1, where mistakes do not show
            weight += 0.2 * torch.randn_like(weight)
    return teacher


def randomize(velocity):
    """Make all of a velocity's weights matter: its time vectors are zero at first."""
    torch.manual_seed(1)
    for weight in velocity.time_mlp[-1].parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return velocity.eval()


def student_of(teacher, start, end, solver="midpoint", k=1):
    """A student with a random flow."""
    torch.manual_seed(2)
    config = lft.LFTConfig(teacher.config.to_dict(), start, end, solver, k, "a teacher", lft.fingerprint(teacher))
    student = lft.LFTForCausalLM(config, teacher).eval()
    randomize(student.flow.velocity)
    return student.requires_grad_(False)


def call_of(layer, model, ids):
    """What the library calls a layer with, and what comes out: state, context, output."""
    seen = []
    handle = layer.register_forward_hook(lambda _, args, context, out: seen.append((args[0], context, out)), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


def double_kl(teacher_logits, logits):
    """KL(teacher || student) of each token, in double precision."""
    p, q = (each.double().softmax(-1) for each in (teacher_logits, logits))
    return (p * (p / q).log()).sum(-1)


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


# The families


@pytest.mark.parametrize("family", FAMILIES)
def test_the_velocity_starts_as_the_layer_and_a_flow_of_one_layer_as_the_teacher(ids, family):
    teacher = random_teacher(family)
    for number, t in ((0, 0.0), (2, 0.37), (5, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1))):
        layer = lft.backbone(teacher).layers[number]
        x, context, expected = call_of(layer, teacher, ids)
        torch.testing.assert_close(x + lft.VelocityBlock(layer)(x, t, **context), expected, atol=1e-5, rtol=1e-5)
        student = lft.LFTForCausalLM(lft.LFTConfig(teacher.config.to_dict(), number, number + 1, "euler", 1), teacher).eval()
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_pair_is_the_librarys_own_states(ids, family):
    teacher = random_teacher(family)
    states = teacher(ids, output_hidden_states=True).hidden_states
    for start, end in ((0, 1), (1, 4), (2, 6), (0, 6)):
        trunk = lft.trunk_of(teacher, end)
        trunk.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the head was run"))
        x0, x1, _ = lft.hidden_pair(trunk, ids, start)
        assert torch.equal(x0, states[start]) and len(lft.backbone(trunk).layers) == end
        assert torch.equal(x1 if end < 6 else lft.final_norm(teacher)(x1), states[end])  # the library's last is after the norm


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_uncached_ones_and_a_saved_student_is_the_same(ids, family, tmp_path):
    student = student_of(random_teacher(family), 1, 5, "midpoint", 2)
    expected = student(ids, use_cache=False).logits
    cache = DynamicCache(config=student.config.get_text_config())
    parts = [student(part, past_key_values=cache, use_cache=True).logits for part in ids.split([11, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
    student.save_pretrained(tmp_path)
    again = lft.LFTForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in student.state_dict().items())


@pytest.mark.parametrize("family", [*FAMILIES, *UNFIT])
def test_a_teacher_is_taken_if_its_layers_fit_and_refused_otherwise(family, tmp_path, tokenizer):
    random_teacher(family, vocab_size=2048).half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if family in UNFIT:
        with pytest.raises(lft.InputError, match="attend alike"):
            lft.load_teacher(str(tmp_path))
    else:
        teacher, _ = lft.load_teacher(str(tmp_path))
        assert {weight.dtype for weight in teacher.parameters()} == {torch.float32} and not teacher.training
        assert not any(weight.requires_grad for weight in teacher.parameters())


# The velocity field


@pytest.mark.parametrize("family", ["neox", "neox-sequential"])
def test_the_velocity_is_the_formula_of_the_paper_with_a_time_for_each_sequence(ids, family):
    teacher = random_teacher(family)
    layer, times = lft.backbone(teacher).layers[2], [0.1, 0.3, 0.9]
    velocity = randomize(lft.VelocityBlock(layer))
    x, context, _ = call_of(layer, teacher, ids)
    first, _, last = velocity.time_mlp
    together = velocity(x, torch.tensor(times).view(3, 1, 1), **context)
    for i, t in enumerate(times):
        frequencies = torch.tensor([1000 ** (i / 63) for i in range(64)])
        time = torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)])
        hidden = torch.nn.functional.silu(first.weight @ time + first.bias)
        b1, g1, a1, b2, g2, a2 = (last.weight @ hidden + last.bias).view(6, 32) + torch.tensor([0, 1, 1, 0, 1, 1])[:, None]
        attention = a1 * layer.attention(g1 * layer.input_layernorm(x) + b1, **context)[0]
        y = x if family == "neox" else x + attention
        expected = attention + a2 * layer.mlp(g2 * layer.post_attention_layernorm(y) + b2)
        torch.testing.assert_close(velocity(x, t, **context), expected, atol=1e-3, rtol=1e-3)  # sin(1000 t) in single precision
        torch.testing.assert_close(together[i], expected[i], atol=1e-3, rtol=1e-3)
        assert (together[i - 1] - expected[i - 1]).abs().max() > 0.1  # and time matters


# The solvers


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2)])
def test_solvers_have_their_order(solver, order):
    def velocity(x, t):  # dx/dt = (1 + 2t) x is solved by x(t) = x(0) exp(t + t²)
        return (1 + 2 * t) * x

    x0, errors = torch.tensor([[1.0], [-0.5]], dtype=torch.float64), []
    for k in (64, 128, 256):
        x1 = lft.integrate(velocity, x0, [i / k for i in range(k + 1)], solver)
        errors.append((x1 - x0 * math.exp(2)).abs().max().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


# The span replaced


@pytest.mark.parametrize("family", ["neox", "mistral", "qwen2"])
def test_skipping_equals_a_model_rebuilt_without_those_layers(ids, family):
    teacher = random_teacher(family)
    for start, end in ((0, 2), (2, 5), (4, 6)):
        rebuilt = random_teacher(family, num_hidden_layers=6 - (end - start))
        weights = {name: weight for name, weight in teacher.state_dict().items() if ".layers." not in name}
        prefix = next(name.split(".layers.")[0] for name in teacher.state_dict() if ".layers." in name)
        for new, old in enumerate([*range(start), *range(end, 6)]):
            for name, weight in lft.backbone(teacher).layers[old].state_dict().items():
                weights[f"{prefix}.layers.{new}.{name}"] = weight
        rebuilt.load_state_dict(weights)
        skipping = lft.replace_span(teacher, start, end)
        assert torch.equal(skipping(ids).logits, rebuilt(ids).logits) and skipping.config.to_dict() == rebuilt.config.to_dict()
        assert torch.equal(skipping.generate(ids, max_new_tokens=4, do_sample=False), rebuilt.generate(ids, max_new_tokens=4, do_sample=False))


def test_the_teacher_is_shared_and_untouched(small, ids):
    before, logits, layers = lft.fingerprint(small), small(ids).logits, list(small.gpt_neox.layers)
    student = student_of(small, 1, 4, "euler", 2)
    student(ids), lft.replace_span(small, 0, 4)(ids)
    assert lft.fingerprint(small) == before and torch.equal(small(ids).logits, logits)
    assert [*small.gpt_neox.layers] == layers and small.config.num_hidden_layers == 6
    assert [layer.attention.layer_idx for layer in layers] == [*range(6)]
    theirs = {id(weight) for weight in small.parameters()}
    own = {name for name, weight in student.named_parameters() if id(weight) not in theirs}
    assert own == {f"model.gpt_neox.layers.1.velocity.{name}" for name in student.flow.velocity.state_dict()}


def test_a_later_setting_of_the_teacher_leaves_the_student_alone(ids):
    teacher = random_teacher()
    student = student_of(teacher, 1, 4, "euler", 2)
    logits = student(ids).logits
    teacher.set_attn_implementation("eager")  # whose masks mean something else: a flow that followed would see the future
    assert torch.equal(student(ids).logits, logits)
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("sdpa")
    torch.testing.assert_close(student(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert student.flow.velocity.layer.attention.config._attn_implementation == "eager"


@pytest.mark.parametrize("start, end", [(3, 3), (4, 2), (-1, 2), (0, 7)])
def test_a_span_outside_the_model_is_refused(small, start, end):
    for replace in (lft.replace_span, student_of):
        with pytest.raises(lft.InputError, match="6 layers"):
            replace(small, start, end)


class TwoAttentions(lft.VelocityBlock):
    """A velocity of two blocks, one after the other."""

    def __init__(self, layer):
        super().__init__(layer)
        self.second = randomize(lft.VelocityBlock(layer))

    def forward(self, x, t, **context):
        first = super().forward(x, t, **context)
        return first + self.second(x + first, t, **context)


def test_a_velocity_of_two_attentions_takes_two_cache_slots_an_evaluation(small, ids):
    flow = lft.FlowLayer(TwoAttentions(small.gpt_neox.layers[2]), 1, 5, "midpoint", 1)
    model = lft.replace_span(small, 1, 5, flow).eval()
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([11, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert [cache.get_seq_length(slot) for slot in range(6)] == [20] * 6
    model.gpt_neox.layers[1].k = 2
    with pytest.raises(lft.InputError, match="cache slots"):
        model(ids, use_cache=True)
    model(ids, use_cache=False)


# Calling the student as a model of transformers


def left_padded(ids, lengths):
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family, attention", [("neox", "sdpa"), ("neox", "eager"), ("mistral", "sdpa"), ("qwen3", "sdpa")])
def test_greedy_text_with_a_cache_is_that_of_whole_forward_passes(ids, family, attention, cache):
    teacher = random_teacher(family)
    teacher.set_attn_implementation(attention)
    for start, end, solver, k, lengths in ((0, 3, "euler", 2, [20, 20, 20]), (2, 6, "midpoint", 2, [20, 13, 1])):
        student, inputs = student_of(teacher, start, end, solver, k), left_padded(ids, lengths)
        assert student.generation_config.eos_token_id == teacher.generation_config.eos_token_id == 0
        out = student.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation=cache, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, eos_token_id=None,
        )  # fmt: skip
        for row, n in enumerate(lengths):
            alone = ids[row : row + 1, 20 - n :]
            for step in range(6):
                logits = student(alone, use_cache=False).logits[:, -1]
                torch.testing.assert_close(out.logits[step][row : row + 1], logits, atol=1e-4, rtol=1e-4)
                alone = torch.cat([alone, logits.argmax(-1, keepdim=True)], 1)
            assert torch.equal(out.sequences[row, 20:], alone[0, n:])


def test_beams_and_sampling_with_a_cache_are_those_without(small, ids):
    student, inputs = student_of(small, 1, 5, "midpoint", 2), left_padded(ids, [20, 13, 7])
    for how in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        texts = []
        for cache in (True, False):
            torch.manual_seed(0)
            texts.append(student.generate(**inputs, max_new_tokens=6, use_cache=cache, pad_token_id=0, **how))
        assert torch.equal(*texts) and texts[0].shape[1] > 20


def test_a_student_drafts_for_its_teacher_and_its_cache_stays_right(tokenizer):
    """As many of its drafts are kept as of a plain model's with the same logits, and the text is the teacher's own."""
    teacher, _ = lft.load_teacher("tiny_teacher")
    plain = lft.replace_span(teacher, 6, 10)
    student = lft.LFTForCausalLM(lft.LFTConfig(plain.config.to_dict(), 4, 5, "euler", 1), plain).eval()  # untrained: layer 4 itself
    prompts = [tokenizer((HERE / "lft.py").read_text(), return_tensors="pt")["input_ids"][:, 3000:3040]]
    (texts, *figures), (_, *expected) = (drafting.drafts(teacher, drafter, prompts, 30) for drafter in (student, plain))
    assert torch.equal(texts[0], drafting.generate(teacher, prompts[0], 30)) and figures == expected and 0 < figures[0] < 1


@pytest.mark.parametrize("end", [4, 6])
def test_hidden_states_are_those_that_enter_each_layer_and_the_last_after_the_norm(small, ids, end):
    student = student_of(small, 2, end, "midpoint", 2)
    output = student(ids, output_hidden_states=True, use_cache=False)
    teacher_states = small(ids, output_hidden_states=True).hidden_states
    x, context, _ = call_of(small.gpt_neox.layers[2], small, ids)
    expected = [*teacher_states[:3]]
    for t in (0.0, 0.5):
        halfway = x + 0.25 * student.flow.velocity(x, t, **context)
        x = x + 0.5 * student.flow.velocity(halfway, t + 0.25, **context)
    for layer in small.gpt_neox.layers[end:]:
        expected.append(x)
        x = layer(x, **context)
    expected.append(small.gpt_neox.final_layer_norm(x))
    assert len(output.hidden_states) == len(expected) == 3 + 6 - end + 1
    for given, by_hand in zip(output.hidden_states, expected):
        torch.testing.assert_close(given, by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small.get_output_embeddings()(output.hidden_states[-1]), output.logits)


def test_the_embeddings_are_found_where_the_library_looks_for_them(small):
    student = student_of(small, 1, 4)
    assert student.get_input_embeddings().weight is small.get_input_embeddings().weight
    assert student.get_output_embeddings().weight is small.get_output_embeddings().weight


def test_the_solver_and_k_may_be_changed_at_any_time(small, ids):
    student = student_of(small, 1, 4, "midpoint", 3)
    seen = [student(ids, use_cache=False).logits]
    for solver, k in (("euler", 3), ("euler", 1), ("midpoint", 1)):
        student.config.solver, student.config.k = solver, k
        seen.append(student(ids).logits)
        assert torch.equal(seen[-1], student_of(small, 1, 4, solver, k)(ids).logits)
    assert all((one - two).abs().max() > 1e-3 for one, two in itertools.combinations(seen, 2))


def test_a_student_in_bfloat16_is_near(small, ids):
    student = student_of(small, 1, 4, "midpoint", 3)
    expected = student(ids, use_cache=False).logits
    half = copy.deepcopy(student).to(torch.bfloat16)(ids, use_cache=False).logits
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.05 * expected.norm()


def test_gradient_checkpointing_gives_the_same_gradients(ids):
    gradients, evaluations = [], []
    for checkpointing in (False, True):
        student = student_of(random_teacher(), 1, 4, "midpoint", 2).train().requires_grad_(True)
        if checkpointing:
            student.activation_checkpointing_enable()
        student.flow.velocity.register_forward_pre_hook(lambda *_: evaluations.append(checkpointing))
        student(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([weight.grad for weight in student.parameters()])
    assert evaluations.count(False) == 4 and evaluations.count(True) == 8  # run again while going backwards
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


# The losses


def test_each_token_counts_by_its_length():
    error, x1 = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for power in (0.0, 0.5, 1.0, 2.0):
        by_hand = [(e**2).sum() / 4 / ((x**2).sum() / 4) ** (power / 2) for e, x in zip(error.flatten(0, 1), x1.flatten(0, 1))]
        torch.testing.assert_close(train_fm.mean_square(error, x1, power), sum(by_hand) / 6)
    torch.testing.assert_close(train_fm.mean_square(error, x1, 0.0), torch.nn.functional.mse_loss(error, torch.zeros(2, 3, 4)))
    torch.testing.assert_close(train_fm.mean_square(error, 3 * x1, 1.0), train_fm.mean_square(error, x1, 1.0) / 3)
    x0, x1 = torch.zeros(1, 5, 2), torch.tensor([[[30.0, 40], [3, 4], [0, 5], [5, 0], [-3, 4]]])  # squares 2500, and 25 four times
    assert train_fm.describe_tokens(x0, x1) == "100.0 times the median's |x1 − x0|², and 96.2% of the sum"


def test_flow_matching_loss_where_paths_cross_is_the_conditional_variance():
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 400_000, 1, 1, dtype=torch.float64)  # independent: x_t tells little of where it came from
    # Of x1 - x0, given x_t, the mean is (2t-1) x_t / (t²+(1-t)²) and the variance 1 / (t²+(1-t)²): on average π/2.
    loss = train_fm.flow_matching_loss(lambda x, t: (2 * t - 1) * x / (t**2 + (1 - t) ** 2), x0, x1)
    assert loss.item() == pytest.approx(math.pi / 2, rel=0.01)


@pytest.mark.parametrize("options, power", [({}, 1), ({"time_power": 3.0}, 3)])
def test_times_of_flow_matching_are_one_a_sequence_and_uniform_unless_asked_otherwise(options, power):
    seen, x0 = [], torch.zeros(20_000, 2, 1)
    torch.manual_seed(0)
    train_fm.flow_matching_loss(lambda x, t: seen.append((x, t)) or x, x0, x0 + 1, **options)
    x, t = seen[0]
    assert torch.equal(x, t.expand_as(x))  # x_t on the path from 0 to 1 is t itself
    below = torch.arange(1, 20_001) / 20_000  # the share of times up to each of them: Kolmogorov's distance
    assert (t.flatten().sort().values ** (1 / power) - below).abs().max() < 1.63 / 20_000**0.5


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_gradient_of_flow_walking_is_that_of_a_loop_by_hand(double_precision, ids, solver, k):
    teacher = random_teacher()
    velocity = randomize(lft.VelocityBlock(teacher.gpt_neox.layers[2]))
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, 4), ids, 1)
    torch.manual_seed(7)
    loss = train_fw.flow_walking_loss(functools.partial(velocity, **context), x0, x1, k=k, solver=solver, token_power=1.0)
    torch.manual_seed(7)
    draws, squares = torch.rand(k - 1, 3, 1, 1), 0
    for i in range(3):  # one sequence after another
        x, t = x0[i : i + 1], torch.zeros(1, 1, 1)
        for s in [*draws[:, i : i + 1].sort(dim=0).values, torch.ones(1, 1, 1)]:
            slope = velocity(x, t, **context)
            if solver == "midpoint":
                slope = velocity(x + (s - t) / 2 * slope, (s + t) / 2, **context)
            x, t = x + (s - t) * slope, s
        squares = squares + ((x - x1[i : i + 1]).square().mean(-1) / x1[i : i + 1].square().mean(-1).sqrt()).sum()
    by_hand, weights = squares / x1[..., 0].numel(), list(velocity.parameters())
    torch.testing.assert_close(loss, by_hand)
    for one, two in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(by_hand, weights)):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_the_hybrid_adds_alpha_times_flow_matching(small, ids):
    velocity = randomize(lft.VelocityBlock(small.gpt_neox.layers[2]))
    x0, x1, context = lft.hidden_pair(lft.trunk_of(small, 4), ids, 1)
    u = functools.partial(velocity, **context)
    torch.manual_seed(3)
    hybrid = train_fw.flow_walking_loss(u, x0, x1, alpha=0.1, token_power=1.0)
    torch.manual_seed(3)
    walking, matching = (loss_of(u, x0, x1, token_power=1.0) for loss_of in (train_fw.flow_walking_loss, train_fm.flow_matching_loss))
    torch.testing.assert_close(hybrid, walking + 0.1 * matching)
    assert matching > 0.1


@pytest.mark.parametrize("end", [4, 6])
def test_the_logit_term_is_the_kl_between_the_models_logits(double_precision, ids, end):
    """Value and gradient, against the student and the teacher as whole models."""
    teacher = random_teacher()
    student = student_of(teacher, 1, end, "euler", 1)
    weights = list(student.flow.velocity.requires_grad_(True).parameters())
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, end), ids, 1)
    logits = functools.partial(train_fm.logits_after, lft.replace_span(teacher, 0, end))
    u = functools.partial(student.flow.velocity, **context)
    losses = [train_fw.flow_walking_loss(u, x0, x1, logits, 1, "euler", logit_weight=weight) for weight in (2.0, 0.0)]
    kl = double_kl(teacher(ids).logits, student(ids).logits).mean()
    assert kl > 0.01
    torch.testing.assert_close(losses[0] - losses[1], 2 * kl, rtol=1e-4, atol=0)  # it is taken in single precision
    given, expected = (torch.cat([g.flatten() for g in torch.autograd.grad(f, weights)]) for f in (losses[0] - losses[1], 2 * kl))
    assert (given - expected).norm() < 1e-4 * expected.norm()


# Text


class Letters:
    """A tokenizer that a test can read: one token a letter."""

    eos_token_id = 0

    def __call__(self, texts, verbose=False):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def letters(rows):
    """The text of rows, with | for the end of a document."""
    return "".join(chr(token) for row in rows for token in row["ids"]).replace("\0", "|")


def text_at(place, held_out=False, **more):
    return letters(data.token_rows(str(place), Letters(), 1, held_out, **more))


def write_lines(path, texts):
    """Rows with a column "text": JSON lines, compressed if the file's name says so, or parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return data.Dataset.from_dict({"text": texts}).to_parquet(path)
    lines = "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in texts).encode()
    path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)


@pytest.fixture(scope="session")
def pile(tmp_path_factory):
    """A small data set laid out like monology/pile-uncopyrighted."""
    folder, words = tmp_path_factory.mktemp("pile"), (HERE / "lft.py").read_text().split()
    texts = [" ".join(words[i : i + 40]) for i in range(0, 1200, 40)]  # 30 documents
    write_lines(folder / "train" / "00.jsonl.zst", texts[:11])
    write_lines(folder / "train" / "01.jsonl.zst", texts[11:25])
    write_lines(folder / "val.jsonl.zst", texts[25:])
    write_lines(folder / "test.jsonl.zst", ["never read"])
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file that is quickly read."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((HERE / "lft.py").read_text())
    return path


def test_documents_are_joined_by_end_of_text_and_cut():
    rows = data.pack({"text": ["abc", None, "", "defgh", "ij"]}, [5, 6, 7, 8, 9], Letters(), 4, (0, 1))
    assert letters({"ids": ids} for ids in rows["ids"]) == "abc||defgh|i" and rows["document"] == [5, 7, 8]
    assert [len(ids) for ids in rows["ids"]] == [4, 4, 4]


def test_the_standard_library_is_split_by_file_and_the_split_stays_the_same():
    """The embedded teacher has never seen the held-out files: another split would score it on what it was trained on."""
    train, held_out = (list(data.stdlib_texts(part)) for part in (False, True))
    assert not set(train) & set(held_out) - {""}
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    assert not any("class TestCase(unittest.TestCase" in text for text in train + held_out)
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "dataclasses.py", "heapq.py"):
        assert (root / name).read_text() in train
    for name in ("asyncio/events.py", "codecs.py", "email/parser.py", "functools.py"):
        assert (root / name).read_text() in held_out


def test_validation_and_test_are_every_other_held_out_row_spread_over_the_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("." * 1900 + "".join(letter * 10 for letter in "abcdefghij"))

    def first_letters(tokens, **more):
        ids, documents = data.held_out_rows(str(path), Letters(), 10, tokens, **more)
        assert set(documents.tolist()) == {0}
        return "".join(chr(row[0]) for row in ids)

    assert first_letters(10_000) == "acegi" and first_letters(10_000, test=True) == "bdfhj"
    assert first_letters(30) == "aei" and first_letters(30, test=True) == "bfj"
    with pytest.raises(lft.InputError, match="one held-out row"):
        data.held_out_rows(str(path), Letters(), 100, 100, test=True)


A_TO_D = {"1.txt": "a" * 190 + "b" * 10, "2.txt": "c" * 95 + "d" * 5}  # the last twentieth of each document is held out
ROWS = ["a" * 19 + "b", None, "c" * 38 + "dd"]
PILE = {"train/00.jsonl.zst": ["abcd", "efgh"], "train/01.jsonl.zst": ["ijkl"], "val.jsonl.zst": ["mn", "op"], "test.jsonl.zst": ["q"]}


@pytest.mark.parametrize(
    "files, place, train, held_out",
    [
        (A_TO_D, "*.txt", "a" * 190 + "|" + "c" * 95 + "|", "b" * 10 + "|" + "d" * 5 + "|"),
        (A_TO_D, "", "a" * 190 + "|" + "c" * 95 + "|", "b" * 10 + "|" + "d" * 5 + "|"),
        (A_TO_D, "2.txt", "c" * 95 + "|", "d" * 5 + "|"),
        ({"tess.txt": "a" * 95 + "b" * 5, "valley.txt": "c" * 95 + "d" * 5}, "", "a" * 95 + "|" + "c" * 95 + "|", "b" * 5 + "|" + "d" * 5 + "|"),
        ({"train.txt": "ab\ncd\n", "val.txt": "ef\ngh\n"}, "", "ab\ncd\n|", "ef\ngh\n|"),
        (PILE, "", "abcd|efgh|ijkl|", "mn|op|"),
        ({name: PILE[name] for name in PILE if "val" not in name}, "", "abcd|efgh|ijkl|", "q|"),
        ({name: PILE[name] for name in PILE if "train" in name}, "", "abc|efg|ijk|", "d|h|l|"),
        (PILE, "train/*.jsonl.zst", "abc|efg|ijk|", "d|h|l|"),
        ({"x.jsonl": ROWS}, "x.jsonl", "a" * 19 + "|" + "c" * 38 + "|", "b|dd|"),
        ({"x.parquet": ROWS}, "x.parquet", "a" * 19 + "|" + "c" * 38 + "|", "b|dd|"),
        ({"x.csv": f"id,text\n1,{ROWS[0]}\n2,\n3,{ROWS[2]}\n"}, "x.csv", "a" * 19 + "|" + "c" * 38 + "|", "b|dd|"),
        ({"x.jsonl.zst": ROWS, "y.txt": "no"}, "*.zst", "a" * 19 + "|" + "c" * 38 + "|", "b|dd|"),
    ],
)
def test_text_is_read_by_document_and_its_held_out_part_left_out(tmp_path, files, place, train, held_out):
    """What is streamed like monology/pile-uncopyrighted has its own splits; of the rest each document is cut in two."""
    for name, content in files.items():
        write_lines(tmp_path / name, content) if isinstance(content, list) else (tmp_path / name).write_text(content)
    assert text_at(tmp_path / place) == train and text_at(tmp_path / place, held_out=True) == held_out
    rows = data.token_rows(str(tmp_path / place), Letters(), 1)
    documents = sorted({row["document"] for row in rows})  # a null has a number, and no text
    assert [documents.index(row["document"]) for row in rows] == [train[:i].count("|") for i in range(len(train))]


def test_many_short_documents_fill_rows_as_a_few_long_ones_do(tmp_path):
    write_lines(tmp_path / "x.jsonl", ["abcdefghijklmnopqrst"] * 200)  # 4,000 letters, of which 200 are held out
    for held_out, expected in ((False, "abcdefghijklmnopqrs|"), (True, "t|")):
        rows = list(data.token_rows(str(tmp_path / "x.jsonl"), Letters(), 150, held_out))
        assert expected * 7 in letters(rows)


@pytest.mark.parametrize("name, content", [
    *((name, content) for name in ("x.txt", "x.jsonl") for content in (b"", b"\x89PNG\xff\xfe\x00" * 100)),
    ("x.jsonl", json.dumps({"content": "no column of that name " * 20}).encode()),
])  # fmt: skip
def test_what_is_no_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(lft.InputError):
        data.token_rows(str(tmp_path / name), Letters(), 80)


@pytest.mark.parametrize("streamed", [False, True])
def test_processes_share_the_rows_out_and_every_row_comes_once_in_a_pass(text, pile, streamed, tokenizer):
    place = str(pile if streamed else text)
    everything = [row["ids"] for row in data.token_rows(place, tokenizer, 32)]

    def taken(n, seed=0, **more):
        return [row["ids"] for row in itertools.islice(data.training_rows(place, tokenizer, 32, seed, **more), n)]

    one, n = taken(len(everything)), len(everything)
    assert n > 30 and sorted(one) == sorted(everything)
    assert taken(2 * n) == one * 2 and (streamed or (one != everything and taken(n, seed=1) != one))
    if not streamed:
        shares = [taken(n // 4, rank=rank, world_size=2) for rank in (0, 1)]
        assert [*itertools.chain(*zip(*shares))] == one[: n // 4 * 2]


def test_processes_stream_text_of_their_own(pile):
    """Of two files each process reads one, and of one file it takes every other row."""
    def shares(place, seq_len):
        return [[row["ids"] for row in data.token_rows(str(place), Letters(), seq_len, False, rank, n)] for rank, n in ((0, 1), (0, 2), (1, 2))]

    for place in (pile, pile / "train" / "00.jsonl.zst"):
        everything, *parts = shares(place, 1)
        assert sorted(everything) == sorted(parts[0] + parts[1]) and min(map(len, parts)) > 1000
    everything, *parts = shares(place, 32)
    assert parts == [everything[::2], everything[1::2]]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_place_in_the_text_is_kept(text, pile, streamed, tokenizer):
    place = str(pile if streamed else text)
    rows = data.training_rows(place, tokenizer, 32)
    taken, states = [], []
    for row in itertools.islice(rows, 500):  # over the end of a pass
        taken.append(row["ids"])
        states.append(json.dumps(rows.state_dict()))
    assert taken[0] in taken[200:430]
    for after in (0, 1, 40, 41, 150, 300, 430):
        again = data.training_rows(place, tokenizer, 32)
        again.load_state_dict(json.loads(states[after]))
        assert [row["ids"] for row in itertools.islice(again, 60)] == taken[after + 1 : after + 61]


# Runs


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer):
    """A small random teacher as a folder, with the embedded teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    random_teacher(vocab_size=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(train_fm, "has_bfloat16", lambda device: False)


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def logged(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def config_of(run):
    with safe_open(run / "flow.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])


def listing(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))


def is_equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_equal_runs(one, two, log=True):
    """The same weights and optimizers, bit for bit, and the same log."""
    checkpoints = [checkpoint_of(run) for run in (one, two)]
    for key in ("method", "fingerprint", "step", "velocity", "optimizers"):
        assert is_equal(*(checkpoint[key] for checkpoint in checkpoints)), key
    assert is_equal(*(load_file(run / "flow.safetensors") for run in (one, two)))
    assert is_equal(checkpoints[0]["velocity"], load_file(one / "flow.safetensors"))
    if log:
        assert is_equal(*([line | {"tokens_per_second": 0} for line in logged(run)] for run in (one, two)))


@pytest.mark.parametrize("module, k", [(train_fm, 1), (train_fw, 3)])
def test_a_run_is_saved_loaded_and_scored(script, options, tmp_path, module, k, teacher_folder, text):
    run, before = tmp_path / "run", os.umask(0o022)
    try:
        status, printed, _ = script(module, *options, "--out", run)
    finally:
        os.umask(before)
    assert status == 0 and "layers 1..3, 3 of 6" in printed and str(run) in printed.splitlines()[-1]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.pt", "flow.safetensors", "log.jsonl"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.iterdir()} == {0o644}
    config = config_of(run)
    assert (config["start"], config["end"], config["solver"], config["k"]) == (1, 4, "midpoint", k)
    assert config["training"]["tokens"] == 3 * 8 * 32 and config["training"]["max_steps"] == 3

    student, tokenizer = lft.load_student(run)
    teacher, _ = lft.load_teacher(str(teacher_folder))
    weights = load_file(run / "flow.safetensors")
    assert is_equal(weights, student.flow.velocity.state_dict())
    assert not torch.equal(weights["layer.mlp.dense_h_to_4h.weight"], teacher.gpt_neox.layers[1].mlp.dense_h_to_4h.weight)
    rows, _ = data.held_out_rows(str(text), tokenizer, 32, 10_000)
    kl = double_kl(teacher(rows).logits, student(rows, use_cache=False).logits).mean().item()
    assert logged(run)[-1]["held_out_kl"] == pytest.approx(kl, rel=1e-4)  # what training said of the student is true of it

    status, printed, _ = script(eval_kl, run, "--tokens", 128, "--json", tmp_path / "table.json", "--device", "cpu")
    table = json.loads((tmp_path / "table.json").read_text())
    assert status == 0 and (table["start"], table["end"], table["tokens"]) == (1, 4, 128)
    assert table["flow"] == lft.fingerprint(student.flow) and table["fingerprint"] == lft.fingerprint(teacher)
    found = {row["name"]: row["kl"] for row in table["rows"]}
    rows, _ = data.held_out_rows(str(text), tokenizer, 32, 128, test=True)
    kl = double_kl(teacher(rows).logits, student(rows, use_cache=False).logits).mean().item()
    assert found[f"LFT midpoint x{k}"] == pytest.approx(kl, rel=1e-4) and len(found) > 12
    for row in table["rows"]:
        assert re.search(f"^{row['name']} .*{row['kl']:.4f}.*{row['nmse']:.4f}.*{row['perplexity']:.2f}.*{row['top1_agreement']:.1%}", printed, re.M)
    ratio = found[f"LFT midpoint x{k}"] / found["skip 2, best inside span"]
    assert f"KL over skip 2's: {ratio:.2f} best inside span" in printed


def test_the_fork_in_the_readme_trains_and_resumes(script, options, tmp_path):
    fork = ModuleType("l1")
    exec(next(part for part in (HERE / "README.md").read_text().split("```") if "def l1_loss" in part).removeprefix("python"), fork.__dict__)
    assert script(fork, *options, "--out", tmp_path / "run")[0] == 0 and config_of(tmp_path / "run")["training"]["method"] == "l1"
    assert script(fork, "--resume", tmp_path / "run", "--max-steps", 4)[0] == 0 and checkpoint_of(tmp_path / "run")["step"] == 4


def test_training_brings_the_student_nearer(script, tmp_path, tokenizer):
    """A short run on the embedded teacher leaves less than half of the KL of the dropped span."""
    options = ["--teacher", "tiny_teacher", "--data", HERE / "*.py", "--start", 4, "--end", 8, "--batch-size", 4, "--seq-len", 64]
    assert script(train_fw, *options, "--out", tmp_path, "--max-steps", 60, "--device", "cpu")[0] == 0
    teacher, _ = lft.load_teacher("tiny_teacher")
    rows, _ = data.held_out_rows(str(HERE / "*.py"), tokenizer, 64, 4096)
    dropped = double_kl(teacher(rows).logits, lft.replace_span(teacher, 4, 8)(rows).logits).mean().item()
    assert logged(tmp_path)[-1]["held_out_kl"] < 0.5 * dropped


def test_the_training_loop_takes_the_steps_written_out_by_hand(script, options, tmp_path, in_float32, teacher_folder, text):
    script(train_fm, *options, "--out", tmp_path, "--max-steps", 4, "--lr", 0.1, "--batch-size", 3, "--seed", 5)
    trained = load_file(tmp_path / "flow.safetensors")
    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    torch.manual_seed(5)
    velocity = lft.VelocityBlock(teacher.gpt_neox.layers[1])
    start = copy.deepcopy(velocity.state_dict())
    by_muon = {name for name, w in velocity.named_parameters() if name.startswith("layer.") and w.ndim == 2}
    assert len(by_muon) == 4  # the matrices of the attention and of the MLP
    matrices, others = ([w for name, w in velocity.named_parameters() if (name in by_muon) == muon] for muon in (True, False))
    optimizers = [
        torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]
    rows = iter(data.training_rows(str(text), tokenizer, 32, seed=5))
    for n in range(1, 5):
        x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, 4), torch.tensor([next(rows)["ids"] for _ in range(3)]), 1)
        torch.manual_seed((5 << 32) + n)
        t = torch.rand(3, 1, 1)
        loss = ((velocity((1 - t) * x0 + t * x1, t, **context) - (x1 - x0)).square().mean(-1) / x1.square().mean(-1).sqrt()).mean()
        loss.backward()
        norm = sum(w.grad.square().sum() for w in velocity.parameters()).sqrt()
        for w in velocity.parameters():
            w.grad /= max(norm, 1)  # clipped at norm 1
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 * n / 50 * (1 - (n - 1) / 4)
            optimizer.step(), optimizer.zero_grad()
    assert logged(tmp_path)[-1]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for optimizer, saved in zip(optimizers, checkpoint_of(tmp_path)["optimizers"], strict=True):
        assert optimizer.state_dict()["param_groups"] == saved["param_groups"]  # the decay, the momenta, the scaling
    # Where the true gradient is 0, as of a bias of the keys, AdamW follows rounding: so a group is compared, not each weight.
    for names in (by_muon, start.keys() - by_muon):
        moved, apart = (sum((velocity.state_dict()[name] - other[name]).square().sum() for name in names) for other in (start, trained))
        assert moved > 0.001 and apart < 0.001 * moved


@pytest.mark.parametrize("module, loss_of, own", [
    (train_fw, train_fw.flow_walking_loss, {"k": 2, "solver": "euler", "alpha": 0.5, "logit_weight": 2.0, "token_power": 0.5}),
    (train_fm, train_fm.flow_matching_loss, {"time_power": 3.0, "token_power": 2.0}),
])  # fmt: skip
def test_the_options_of_a_loss_reach_it(script, options, in_float32, tmp_path, teacher_folder, text, module, loss_of, own):
    script(module, *options, "--max-steps", 1, "--init", "first", "--out", tmp_path, *(f"--{name.replace('_', '-')}={value}" for name, value in own.items()))
    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    ids = torch.tensor([row["ids"] for row in itertools.islice(data.training_rows(str(text), tokenizer, 32), 8)])
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, 4), ids, 1)
    u = functools.partial(lft.VelocityBlock(teacher.gpt_neox.layers[1]), **context)
    logits = functools.partial(train_fm.logits_after, lft.replace_span(teacher, 0, 4))
    torch.manual_seed(1)  # of seed 0, step 1
    assert logged(tmp_path)[-1]["loss"] == pytest.approx(loss_of(u, x0, x1, logits, **own).item(), rel=1e-4)


@pytest.mark.parametrize("init, layer", [("middle", 2), ("first", 1), ("5", 5), ("random", None)])
def test_init_names_the_layer_to_start_from(script, options, tmp_path, init, layer, teacher_folder):
    script(train_fm, *options, "--out", tmp_path, "--init", init, "--max-steps", 1, "--lr", 1e-6)
    weights, (teacher, _) = load_file(tmp_path / "flow.safetensors"), lft.load_teacher(str(teacher_folder))
    apart = [(weights["layer.mlp.dense_h_to_4h.weight"] - each.mlp.dense_h_to_4h.weight).abs().max() for each in teacher.gpt_neox.layers]
    assert [number for number, distance in enumerate(apart) if distance < 1e-3] == ([] if layer is None else [layer])


def test_the_log_says_what_training_did(script, options, tmp_path):
    script(train_fm, *options, "--out", tmp_path, "--max-steps", 25, "--save-every", 20)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 25] and [line["tokens"] for line in lines] == [2560, 5120, 6400]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([1 / 64 * n / 50 * (26 - n) / 25 for n in (10, 20, 25)])
    assert ["held_out_kl" in line for line in lines] == [False, True, True]


# Runs that stop and go on


RESUMED = [(train_fm, False, 1), (train_fm, True, 2), (train_fw, False, 2), (train_fw, True, 1)]


@pytest.mark.parametrize("module, streamed, parts", RESUMED)
def test_a_resumed_run_is_the_run_that_never_stopped(script, options, tmp_path, monkeypatch, module, streamed, parts, pile):
    """Bit for bit, over the end of a pass: the streamed text has about 60 rows, and twelve steps of 8 take 96."""
    whole, half, save_run = tmp_path / "whole", tmp_path / "half", train_fm.save_run

    def save_and_copy(folder, student, checkpoint):
        save_run(folder, student, checkpoint)
        if checkpoint["step"] == 4:
            shutil.copytree(folder, half)

    monkeypatch.setattr(train_fm, "save_run", save_and_copy)
    options += ["--max-steps", 12, "--save-every", 4, "--accumulate", parts, *(["--data", pile] if streamed else [])]
    assert script(module, *options, "--out", whole)[0] == 0
    monkeypatch.undo()
    assert checkpoint_of(half)["step"] == 4
    with open(half / "log.jsonl", "a") as log:  # as of a run that was killed while it wrote what comes after the checkpoint
        log.write('{"step": 5, "tokens": 0}\n{"step": 6, "tok')
    assert script(module, "--resume", half)[0] == 0
    assert_equal_runs(whole, half)
    assert [line["step"] for line in logged(whole)] == [4, 8, 10, 12]


def test_a_run_is_trained_longer_and_other_options_are_refused(script, options, tmp_path):
    run = tmp_path / "run"
    script(train_fm, *options, "--out", run, "--batch-size", 4)
    assert script(train_fm, "--resume", run, "--max-steps", 6)[0] == 0
    assert checkpoint_of(run)["step"] == 6 and [line["tokens"] for line in logged(run)] == [3 * 4 * 32, 6 * 4 * 32]
    assert logged(run)[-1]["lr"] == pytest.approx(1 / 64 * 6 / 50 / 6) and config_of(run)["training"]["max_steps"] == 6
    saved, good = (run / "checkpoint.pt").read_bytes(), checkpoint_of(run)

    def refused(word, *more, module=train_fm, checkpoint=None):
        (run / "checkpoint.pt").write_bytes(saved)
        if checkpoint is not None:
            torch.save(checkpoint, run / "checkpoint.pt")
        before = listing(tmp_path)
        status, printed, errors = script(module, "--resume", run, "--max-steps", 9, *more)
        assert status == 2 and word in errors and errors.count("\n") == 1 and printed == "" and listing(tmp_path) == before

    refused("--batch-size 4", "--batch-size", 8)  # which is the parser's default
    refused("--lr", "--lr", 1.0)
    refused("--seed", "--seed", 1)
    refused("larger --max-steps", "--max-steps", 6)
    refused("train_fm.py", module=train_fw)
    refused("another teacher", checkpoint=good | {"fingerprint": "another"})
    refused("2 processes", checkpoint=good | {"text": good["text"] * 2})
    refused("no checkpoint", checkpoint={"weights": 1})
    refused("no checkpoint", checkpoint=print)  # a pickled function, which is not loaded


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(script, options, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    script(train_fw, *options, "--out", tmp_path / "whole", "--max-steps", 6)
    steps, loss_of = iter(range(6)), train_fw.flow_walking_loss

    def interrupting(*args, **more):
        if next(steps) == 2:
            signal.raise_signal(signal.SIGTERM)  # in the middle of step 3, which is finished
        return loss_of(*args, **more)

    monkeypatch.setattr(train_fw, "flow_walking_loss", interrupting)
    status, printed, _ = script(train_fw, *options, "--out", tmp_path / "part", "--max-steps", 6)
    assert status == 0 and "interrupted" in printed and checkpoint_of(tmp_path / "part")["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.undo()
    assert script(train_fw, "--resume", tmp_path / "part")[0] == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "part", log=False)
    assert [line["step"] for line in logged(tmp_path / "part")] == [3, 6]


def in_process(module, options, environment=None, interrupted=False, unread=False):
    """What a process of its own does: a script's main; with a Ctrl-C during the first step, or a standard output that nobody reads."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    loss_of = train_fm.flow_matching_loss

    def interrupting(*args, **more):
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)
        return loss_of(*args, **more)

    if interrupted:
        train_fm.flow_matching_loss = interrupting
    if unread:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    train_fm.has_bfloat16 = lambda device: False
    sys.argv = [module, *map(str, options)]
    lft.run_script({"train_fm": train_fm, "train_fw": train_fw, "eval_kl": eval_kl}[module].main)


@pytest.fixture(scope="session")
def start_process():
    """A way to start processes that have loaded the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_lft"])

    def start(module, *options, **more):
        process = context.Process(target=in_process, args=(module, options), kwargs=more)
        process.start()
        return process

    return start


def test_a_second_ctrl_c_ends_at_once(start_process, options, tmp_path):
    process = start_process("train_fm", *options, "--accumulate", 2, "--out", tmp_path / "run", interrupted=True)  # one in each part of a step
    process.join()
    assert process.exitcode == -signal.SIGINT and not (tmp_path / "run" / "checkpoint.pt").exists()


KILLS = int(os.environ.get("KILLS", 4))


def test_a_run_killed_at_any_moment_goes_on_from_its_last_checkpoint(start_process, options, tmp_path):
    """kill -9 at random moments, in the middle of a save too; what comes out in the end is the run that nobody killed."""
    options += ["--batch-size", 1, "--max-steps", 20 + 20 * KILLS, "--save-every", 1]
    run, chance = tmp_path / "killed", random.Random(0)
    checkpoint = run / "checkpoint.pt"

    def start():
        return start_process("train_fm", *(["--resume", run] if checkpoint.exists() else [*options, "--out", run]))

    for kill in range(KILLS):
        process, before = start(), checkpoint.read_bytes() if checkpoint.exists() else None
        while process.is_alive() and kill % 3 and (not checkpoint.exists() or checkpoint.read_bytes() == before):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1 if kill % 3 else 1.0))  # two of three while it trains, one at any time
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if checkpoint.exists():
            checkpoint_of(run)
            lft.load_student(run)
    processes = [start(), start_process("train_fm", *options, "--out", tmp_path / "whole")]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert_equal_runs(tmp_path / "whole", run)
    assert [line["step"] for line in logged(run)] == list(range(1, 21 + 20 * KILLS))


def test_a_standard_output_that_nobody_reads_does_not_lose_the_run(start_process, options, tmp_path):
    """As of `train_fm.py … | head -1`, and of `eval_kl.py … --json … | head -1`."""
    for arguments in (
        ("train_fm", *options, "--save-every", 1, "--out", tmp_path / "run"),
        ("eval_kl", tmp_path / "run", "--tokens", 64, "--no-baselines", "--json", tmp_path / "table.json"),
    ):
        process = start_process(*arguments, unread=True)
        process.join()
        assert process.exitcode == 0
    assert checkpoint_of(tmp_path / "run")["step"] == 3 and (tmp_path / "table.json").exists()


def test_a_full_disk_is_said_and_leaves_the_earlier_run(script, options, tmp_path, monkeypatch):
    run, limit, fsync = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE), os.fsync
    assert script(train_fm, *options, "--out", run)[0] == 0
    before = listing(run)

    def fails_in_large_files(number):
        if os.fstat(number).st_size > 20_000:
            raise OSError(28, "No space left on device")
        fsync(number)

    for how in ("a write", "the last moment"):
        try:
            if how == "a write":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # every write beyond fails, as on a full disk
            else:
                monkeypatch.setattr(os, "fsync", fails_in_large_files)
            status, _, errors = script(train_fm, *options, "--out", run, "--overwrite", "--seed", 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert status == 2 and "make room" in errors and errors.count("error:") == 1
        assert listing(run) == before


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint(script, options, tmp_path, monkeypatch):
    run, flow_matching_loss = tmp_path / "run", train_fm.flow_matching_loss
    factors = itertools.chain([1, 1, 1, 1, math.nan], itertools.repeat(1))
    monkeypatch.setattr(train_fm, "flow_matching_loss", lambda *args, **more: flow_matching_loss(*args, **more) * next(factors))
    status, _, errors = script(train_fm, *options, "--out", run, "--max-steps", 9, "--save-every", 3)
    assert status == 2 and "step 5 gave loss nan" in errors and "lower --lr" in errors and errors.count("error:") == 1
    assert checkpoint_of(run)["step"] == 3 and all(weight.isfinite().all() for weight in lft.load_student(run)[0].parameters())


def test_an_overwritten_run_is_whole_until_it_is_replaced(script, options, tmp_path, monkeypatch):
    run, old = tmp_path / "run", tmp_path / "old"
    script(train_fm, *options, "--out", run)
    shutil.copytree(run, old, copy_function=os.link)  # the very files, under other names
    before = [content for _, content in listing(old)]
    monkeypatch.setattr(train_fm, "flow_matching_loss", lambda *args, **more: torch.tensor(math.nan, requires_grad=True))
    assert script(train_fm, *options, "--out", run, "--overwrite")[0] == 2 and [content for _, content in listing(run)] == before
    monkeypatch.undo()
    assert script(train_fm, *options, "--out", run, "--overwrite", "--max-steps", 2)[0] == 0
    assert checkpoint_of(run)["step"] == 2 and [line["step"] for line in logged(run)] == [2]
    assert [content for _, content in listing(old)] == before  # each file was replaced at once, and none was written over


def run_two(start_process, module, *options, interrupted=False):
    """Run a script in two processes, as torchrun starts them; one of them may get a Ctrl-C."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        started.append(start_process(module, *options, environment=environment, interrupted=interrupted and rank == "1"))
    for process in started:
        process.join(120)
        process.kill()  # one that hangs has no exit code yet, and fails
    assert [process.exitcode for process in started] == [0, 0]


def test_parts_and_processes_train_as_one_batch_does(script, options, start_process, in_float32, tmp_path):
    """With one Euler step Flow Walking draws no times, so two processes, or two parts, make the very step that one makes."""
    options += ["--k", 1, "--solver", "euler", "--max-steps", 4, "--lr", 0.001]
    script(train_fw, *options, "--out", tmp_path / "one")
    script(train_fw, *options, "--out", tmp_path / "parts", "--accumulate", 4)
    run_two(start_process, "train_fw", *options, "--out", tmp_path / "two")
    run_two(start_process, "train_fw", *options, "--out", tmp_path / "both", "--accumulate", 2)
    expected, weights = logged(tmp_path / "one")[-1], load_file(tmp_path / "one" / "flow.safetensors")
    for run in ("parts", "two", "both"):
        line, other = logged(tmp_path / run)[-1], load_file(tmp_path / run / "flow.safetensors")
        for key in ("loss", "gradient_norm", "held_out_kl", "tokens"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4)
        assert all((weight - other[name]).norm() <= 1e-4 * weight.norm() + 1e-4 for name, weight in weights.items())


def test_the_gradient_of_two_processes_is_that_of_the_joint_batch(start_process, options, tmp_path, teacher_folder, text):
    """Flow matching in two processes, each with times of its own, against autograd on the joint batch."""
    run_two(start_process, "train_fm", *options, "--max-steps", 1, "--out", tmp_path / "two")
    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    torch.manual_seed(0)
    velocity, times = lft.VelocityBlock(teacher.gpt_neox.layers[1]), []
    for rank in (0, 1):
        torch.manual_seed(1 * 2 + rank)
        times.append(torch.rand(4, 1, 1))
    times = torch.cat(times)
    ids = torch.tensor([row["ids"] for row in itertools.islice(data.training_rows(str(text), tokenizer, 32), 8)])
    x0, x1, context = lft.hidden_pair(lft.trunk_of(teacher, 4), torch.cat([ids[::2], ids[1::2]]), 1)
    loss = ((velocity((1 - times) * x0 + times * x1, times, **context) - (x1 - x0)).square().mean(-1) / x1.square().mean(-1).sqrt()).mean()
    gradients = torch.autograd.grad(loss, list(velocity.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    line = logged(tmp_path / "two")[-1]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4) and line["gradient_norm"] == pytest.approx(norm, rel=1e-3)


def test_two_processes_resume_exactly(start_process, options, tmp_path, pile):
    options += ["--data", pile, "--batch-size", 4, "--max-steps", 4, "--save-every", 2]
    run_two(start_process, "train_fm", *options, "--out", tmp_path / "whole")
    run_two(start_process, "train_fm", *options, "--out", tmp_path / "half", interrupted=True)  # one of them is told to stop
    assert checkpoint_of(tmp_path / "half")["step"] == 1
    run_two(start_process, "train_fm", "--resume", tmp_path / "half")
    assert_equal_runs(tmp_path / "whole", tmp_path / "half", log=False)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_run_that_is_not(script, options, tmp_path):
    losses = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        assert script(train_fw, *options, "--out", tmp_path / name, "--max-steps", 40, *more)[0] == 0
        losses.append([line["loss"] for line in logged(tmp_path / name)])
    plain, compiled = losses
    assert plain[-1] < 0.9 * plain[0] and compiled == pytest.approx(plain, rel=0.01)


# Mistakes


@pytest.mark.parametrize(
    "options, word",
    [
        (["--start", 4, "--end", 4], "6 layers"),
        (["--teacher", "speechless"], "tokenizer"),
        (["--teacher", "headless"], "weights"),
        (["--teacher", "no-such/model"], "tiny_teacher"),
        (["--teacher", "cut.gguf"], "no teacher"),
        (["--data", "no-such/data-set"], "no text"),
        (["--data", "no/such/*.txt"], "no text"),
        (["--data", "short.txt"], "less than one"),
        (["--seq-len", 65], "2 to 64"),
        (["--out", "taken"], "holds a run"),
        (["--out", "short.txt"], "short.txt"),
        (["--resume", "missing"], "no checkpoint"),
        (["--batch-size", 3, "--accumulate", 2], "divided"),
        (["--init", "last"], "first, middle, random or 0..5"),
        (["--lr", 0], "--lr"),
        (["--max-steps", 0], "--max-steps"),
        (["--k", 0], "--k"),
        (["--alpha", "nan"], "--alpha"),
        (["--logit-weight", "-1"], "--logit-weight"),
        (["--seed", -1], "--seed"),
        (["--seed", 2**40], "--seed"),
        (["--device", "nonsense"], "--device cpu"),
        pytest.param(["--device", "cuda"], "--device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
    ],
)
def test_a_mistake_in_training_ends_in_one_sentence(script, tmp_path, monkeypatch, teacher_folder, text, options, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "flow.safetensors").write_text("anything")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    teacher = lft.load_teacher(str(teacher_folder))[0]
    teacher.save_pretrained("speechless")
    shutil.copytree(teacher_folder, "headless")
    weights = load(Path("headless/model.safetensors").read_bytes())
    del weights["embed_out.weight" if "embed_out.weight" in weights else "lm_head.weight"]
    save_file(weights, "headless/model.safetensors", {"format": "pt"})
    before, standard = listing(tmp_path), ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--max-steps", 1]
    status, printed, errors = script(train_fw, *([] if "--resume" in options else standard), *options)
    assert status == 2 and word in errors and printed == "" and listing(tmp_path) == before
    assert errors.count("\n") == 1 or errors.startswith("usage: ")


def test_a_run_that_is_missing_damaged_or_anothers_is_refused(script, options, tmp_path, teacher_folder, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    assert script(train_fm, *options, "--out", run, "--max-steps", 1)[0] == 0
    whole = (run / "flow.safetensors").read_bytes()
    shutil.copytree(teacher_folder, other)
    weights = load((other / "model.safetensors").read_bytes())  # not mapped, as the file is replaced
    weights["gpt_neox.layers.5.mlp.dense_h_to_4h.bias"][3] += 1e-3  # one weight of a layer that the flow never sees
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = config_of(run)
    short = {name: weight for name, weight in load(whole).items() if "time_mlp.0" not in name}

    def refused(word, content, *more):
        (run / "flow.safetensors").write_bytes(content)
        before = listing(run)
        status, printed, errors = script(eval_kl, *more, "--json", tmp_path / "table.json", "--device", "cpu")
        assert status == 2 and word in errors and errors.count("\n") == 1 and printed == ""
        assert listing(run) == before and not (tmp_path / "table.json").exists()

    refused("no run", whole, tmp_path / "nowhere")
    refused("another teacher", whole, run, "--teacher", other)
    refused("no teacher", whole, run, "--teacher", tmp_path / "nowhere")
    refused("no text", whole, run, "--data", tmp_path / "nowhere")
    refused("damaged", whole[: len(whole) // 2], run)
    refused("damaged", b"nothing", run)
    save_file(short, tmp_path / "short.safetensors")
    refused("damaged", (tmp_path / "short.safetensors").read_bytes(), run)  # no configuration
    save_file(short, tmp_path / "short.safetensors", {"config": json.dumps(config)})
    refused("another velocity class", (tmp_path / "short.safetensors").read_bytes(), run)
    monkeypatch.setattr(lft.LFTForCausalLM, "velocity_class", TwoAttentions)
    refused("another velocity class", whole, run)


# The evaluation


def random_rows(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(3))


def test_kl_equals_a_double_precision_reference():
    torch.manual_seed(0)
    teacher, student = 10 * torch.randn(2, 4, 7, 500)
    kl = eval_kl.kl_divergence(*map(eval_kl.log_probabilities, (teacher, student)))
    assert kl.dtype == torch.float32 and kl.shape == (4, 7)
    torch.testing.assert_close(kl.double(), double_kl(teacher, student), rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_how_many_rows_are_taken_at_once(small, monkeypatch):
    scores = []
    for at_once in (2**26, 1):
        monkeypatch.setattr(eval_kl, "LOGITS_AT_ONCE", at_once)
        scores.append(eval_kl.evaluate(small, {"skip": lft.replace_span(small, 1, 3)}, random_rows(6, 24), 4)["skip"])
    for measure, values in scores[0].items():
        assert values.shape == (6,)
        torch.testing.assert_close(values, scores[1][measure], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first, n", [(0, 1), (1, 2), (3, 2), (4, 2), (5, 1), (2, 4)])
def test_the_state_at_end_where_layers_are_skipped(small, first, n):
    """The error is of the state entering layer `end`, here 4, whether the gap lies before, across or after it."""
    rows = random_rows(6, 24)
    x, context, _ = call_of(small.gpt_neox.layers[0], small, rows)
    x1 = skipping = x
    for number, layer in enumerate(small.gpt_neox.layers[:4]):
        x1 = layer(x1, **context)
        if not first <= number < first + n:
            skipping = layer(skipping, **context)
    score = eval_kl.evaluate(small, {"skip": lft.replace_span(small, first, first + n)}, rows, 4)["skip"]
    by_hand = (skipping - x1).square().sum(-1) / x1.square().sum(-1)  # of each token
    torch.testing.assert_close(score["nmse"], by_hand.mean(1), rtol=1e-4, atol=1e-6)


def test_the_standard_error_is_that_of_documents():
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    alone, pairs = torch.arange(60), torch.arange(60) // 2
    assert eval_kl.standard_error(values, alone) == pytest.approx((values.std() / 60**0.5).item())
    means = values.view(30, 2).mean(1)  # of documents of two rows each
    assert eval_kl.standard_error(values, pairs) == pytest.approx((means.std() / 30**0.5).item())
    assert eval_kl.standard_error(values, torch.zeros(60)) is None
    # Documents of different lengths, whose rows are alike, against drawing documents anew.
    generator, lengths = numpy.random.default_rng(0), [1 + n % 5 for n in range(200)]
    effects = generator.normal(size=200)
    values, documents = (torch.tensor(numpy.repeat(each, lengths)) for each in (effects, numpy.arange(200)))
    draws = generator.integers(200, size=(4000, 200))
    means = (effects * lengths)[draws].sum(1) / numpy.array(lengths)[draws].sum(1)
    assert eval_kl.standard_error(values, documents) == pytest.approx(means.std(), rel=0.06)


def test_times_are_taken_in_turn_and_over_the_first_models_of_the_same_round(small, monkeypatch):
    """On a clock of its own: the machine is twice as slow in every other round, and the first round three times."""
    clock, turns = [0.0], []
    monkeypatch.setattr(eval_kl.time, "perf_counter", lambda: clock[0])

    def step(model, number):
        turns.append(number)
        clock[0] += 9.0 * (len(turns) in (2, 5, 8))  # the second model is slow in the first round, and in two of those that count
        clock[0] += (1.0, 0.5, 3.0)[number] * (3 if len(turns) <= 3 else 1 + (len(turns) - 1) // 3 % 2)

    assert eval_kl.times_over_first([small] * 3, step) == pytest.approx([1, 0.5, 3])
    assert turns == [0, 1, 2] * (eval_kl.TIMED_ROUNDS + 1)


@pytest.mark.parametrize("start, end", [(0, 6), (1, 4), (5, 6)])
def test_the_linear_map_is_that_of_least_squares(small, start, end):
    batches = torch.randint(97, (6, 4, 24), generator=torch.Generator().manual_seed(4))
    linear = eval_kl.fit_linear(small, batches, start, end)
    x0, x1, _ = lft.hidden_pair(lft.trunk_of(small, end), batches.flatten(0, 1), start)
    x0, x1 = (x.flatten(0, 1).double() for x in (x0, x1))
    expected = torch.linalg.lstsq(torch.cat([x0, torch.ones(len(x0), 1)], 1), x1).solution
    torch.testing.assert_close(linear.weight.T.double(), expected[:-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.bias.double(), expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start, end", [(1, 4), (0, 6), (5, 6)])
def test_every_row_of_the_table_is_that_model_alone(small, start, end):
    """Each against the logits of a whole model, in double precision; the best skips by a search of our own."""
    rows, documents = random_rows(20, 24), torch.arange(20) // 2  # two rows of each document
    student, linear = student_of(small, start, end, "midpoint", 2), eval_kl.LinearLayer(32, 32).requires_grad_(False)
    table = {row["name"]: row for row in eval_kl.table(small, student, rows, documents, linear)}
    teacher_logits = small(rows, use_cache=False).logits
    kl_of = lambda model: double_kl(teacher_logits, model(rows, use_cache=False).logits).mean(1)  # of each row
    models = {"teacher": small, "span dropped": lft.replace_span(small, start, end), "linear map": copy.deepcopy(small)}
    models["linear map"].gpt_neox.layers = torch.nn.ModuleList([*small.gpt_neox.layers[:start], linear, *small.gpt_neox.layers[end:]])
    for solver, k in itertools.product(("euler", "midpoint"), (1, 2, 3, 8)):
        models[f"LFT {solver} x{k}"] = student_of(small, start, end, solver, k)
    means = {}
    for n in (1, 2, 3, 4):
        skips = {first: lft.replace_span(small, first, first + n) for first in range(6 - n + 1)}
        kls = {first: kl_of(model) for first, model in skips.items()}
        inside = [first for first in skips if start <= first and first + n <= end]
        outside = sorted(skips.keys() - set(inside), key=lambda first: kls[first][::10].mean())  # every tenth row finds the best
        lowest = functools.partial(min, key=lambda first: kls[first].mean())
        best = {"best anywhere": lowest(inside + outside[:1])}
        if inside:
            best |= {"best inside span": lowest(inside), "first of span": start}
            means[f"skip {n}, mean inside span"] = sum(kls[first].mean().item() for first in inside) / len(inside)
        for where, first in best.items():
            models[f"skip {n}, {where}"] = skips[first]
            assert table[f"skip {n}, {where}"]["layers_replaced"] == f"{first}..{first + n - 1}"
    assert table.keys() == models.keys() | means.keys() and [*table][:2] == ["teacher", "LFT euler x1"]

    x0, x1, context = lft.hidden_pair(lft.trunk_of(small, end), rows, start)
    for name, model in models.items():
        row, kl, logits = table[name], kl_of(model), model(rows, use_cache=False).logits.double()
        assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-6) and row["tokens"] == 480
        assert row["kl_stderr"] == pytest.approx((kl.view(10, 2).mean(1).std() / 10**0.5).item(), rel=1e-3, abs=1e-6)
        nll = -logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None]).mean()
        assert row["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
        agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).double().mean().item()
        assert row["top1_agreement"] == pytest.approx(agreement, abs=1e-6)
        assert row["parameters"] == sum(weight.numel() for weight in model.parameters()) and row["prefill_time"] > 0
        evaluations = int(name[-1]) * (1 + ("midpoint" in name)) if name.startswith("LFT") else 0
        layers = 6 - int(name[5]) if name.startswith("skip") else 6 if name == "teacher" else 6 - (end - start) + evaluations
        assert row["evaluations"] == evaluations and row["ideal_time"] == pytest.approx(layers / 6)
        if name.startswith("LFT"):
            assert (row["decode_time"] is None) == (evaluations > end - start)
            nmse = (model.flow(x0, **context) - x1).double().square().sum(-1) / x1.double().square().sum(-1)
            assert row["nmse"] == pytest.approx(nmse.mean().item(), rel=1e-4) and row["layers_replaced"] == f"{start}..{end - 1}"
    for name, kl in means.items():
        assert table[name]["kl"] == pytest.approx(kl, rel=1e-4) and table[name]["tokens"] == 480
    assert table["teacher"]["kl"] == table["teacher"]["nmse"] == 0 and table["teacher"]["prefill_time"] == table["teacher"]["decode_time"] == 1


def test_a_model_whose_first_layers_are_not_the_teachers_is_scored_with_its_own(small, ids):
    own = copy.deepcopy(small)  # equal weights, not the same
    layers, rows = len(lft.backbone(small).layers), ids[:, :8]
    assert eval_kl.first_changed(small, own) == eval_kl.first_changed(small, small) == layers
    for weight, changed in ((lft.backbone(own).layers[1].mlp.dense_4h_to_h.weight, 1), (own.get_input_embeddings().weight, 0)):
        weight.data += 0.05 * torch.randn_like(weight)
        assert eval_kl.first_changed(small, own) == changed
        kl = eval_kl.evaluate(small, {"own": own}, rows, layers)["own"]["kl"]
        torch.testing.assert_close(kl.double(), double_kl(small(rows).logits, own(rows).logits).mean(-1), rtol=1e-3, atol=1e-6)
        assert kl.min() > 1e-4


# The student outside this repository


def test_a_saved_student_loads_where_this_repository_is_not(small, ids, tmp_path):
    student = student_of(small, 1, 4, "midpoint", 1)
    student.save_pretrained(tmp_path / "student")
    torch.save((ids, student(ids).logits, student.generate(ids, max_new_tokens=5, do_sample=False)), tmp_path / "expected")
    (tmp_path / "elsewhere").mkdir()
    code = """
import importlib.util, torch, transformers
assert importlib.util.find_spec("lft") is None
load = transformers.AutoModelForCausalLM.from_pretrained
try:
    load("../student")
    raise AssertionError("code was run that nobody trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error)
student = load("../student", trust_remote_code=True)
ids, logits, text = torch.load("../expected")
torch.testing.assert_close(student(ids).logits, logits, atol=1e-5, rtol=1e-5)
assert torch.equal(student.generate(ids, max_new_tokens=5, do_sample=False), text)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_saved_student_is_loaded_and_scored_like_a_run(script, options, tmp_path):
    script(train_fm, *options, "--out", tmp_path / "run")
    student, tokenizer = lft.load_student(tmp_path / "run")
    student.save_pretrained(tmp_path / "saved"), tokenizer.save_pretrained(tmp_path / "saved")
    again, tokens = lft.load_student(tmp_path / "saved")
    assert is_equal(student.state_dict(), again.state_dict()) and tokens("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    results = []
    for folder in ("run", "saved"):
        table = tmp_path / f"{folder}.json"
        assert script(eval_kl, tmp_path / folder, "--tokens", 64, "--no-baselines", "--json", table, "--device", "cpu")[0] == 0
        made = json.loads(table.read_text())
        results.append([{key: row[key] for key in row if "time" not in key} for row in made.pop("rows")] + [made])
    assert results[0] == results[1] and len(results[0]) == 11
    status, _, errors = script(eval_kl, tmp_path / "saved", "--teacher", "tiny_teacher", "--device", "cpu")
    assert status == 2 and "another teacher" in errors
    path = tmp_path / "saved" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    status, _, errors = script(eval_kl, tmp_path / "saved", "--device", "cpu")
    assert status == 2 and "damaged" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("lost", ["model.gpt_neox.layers.1.velocity.time_mlp.2.weight", "model.gpt_neox.layers.0.mlp.dense_h_to_4h.weight"])
def test_weights_that_are_missing_are_not_made_up(small, tmp_path, lost):
    student_of(small, 1, 4).save_pretrained(tmp_path)
    weights = load((tmp_path / "model.safetensors").read_bytes())
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(lft.InputError, match="weights"):
        lft.LFTForCausalLM.from_pretrained(tmp_path)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    student_of(random_teacher("llama"), 1, 4).save_pretrained(tmp_path)
    assert sum(weight.shape[0] == 97 for weight in load_file(tmp_path / "model.safetensors").values()) == 1
    model = lft.LFTForCausalLM.from_pretrained(tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


# A teacher in a .gguf file


@pytest.fixture
def gguf_file(tmp_path, tokenizer):
    """A random Qwen2 in a .gguf file, written tensor by tensor as llama.cpp names them; and the model itself."""
    teacher = random_teacher("qwen2", vocab_size=2048)
    writer, rope = gguf.GGUFWriter(tmp_path / "teacher.gguf", "qwen2"), teacher.config.rope_parameters["rope_theta"]
    writer.add_context_length(64), writer.add_embedding_length(32), writer.add_block_count(6), writer.add_feed_forward_length(64)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_rope_freq_base(rope)
    writer.add_layer_norm_rms_eps(teacher.config.rms_norm_eps)
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(sorted(tokens["vocab"], key=tokens["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in tokens["merges"]]), writer.add_eos_token_id(0), writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 6)
    for name, weight in teacher.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return tmp_path / "teacher.gguf", teacher


def test_a_gguf_file_is_the_model_that_it_was_made_of(gguf_file, ids, tokenizer):
    path, expected = gguf_file
    teacher, tokens = lft.load_teacher(str(path))
    torch.testing.assert_close(teacher(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)
    assert tokens("def main():")["input_ids"] == tokenizer("def main():")["input_ids"] and tokens.eos_token_id == 0


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_that_gguf_files_need_is_named_where_it_is_missing(gguf_file, monkeypatch, package):
    for module in (modeling_utils, modeling_gguf_pytorch_utils):
        monkeypatch.setattr(module, f"is_{package}_available", lambda *_: False, raising=False)
    with pytest.raises(lft.InputError, match=f"install.*{package}"):
        lft.load_teacher(str(gguf_file[0]))


# studies


OF_TEACHER = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
              "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


def run_study(capsys, module, *options):
    """Run a script's main in this process: its exit status, and what it printed on either stream."""
    sys.argv = [module.__name__, *map(str, options)]
    try:
        return (lft.run_script(module.main) or 0, *capsys.readouterr())
    except SystemExit as error:
        return (error.code, *capsys.readouterr())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a random teacher, a text, and a run of flow matching with its table, all tiny."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**OF_TEACHER)).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained("tiny_teacher").save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text("".join(open(module.__file__).read() for module in (lft, eval_kl, train_fm, results, spans)))
    options = f"--seq-len 32 --max-steps 2 --teacher {folder}/teacher --data {folder}/text.txt --device cpu --start 1 --end 4 --out {folder}/run"
    for module, line in ((train_fm, options), (eval_kl, f"{folder}/run --tokens 128 --json {folder}/run/table.json --device cpu")):
        sys.argv = ["script", *line.split()]
        module.main()
    return folder


def like(study, target, shift=0.0, made={}, **changes):
    """A copy of the run with other options, its table's KLs shifted."""
    shutil.copytree(study / "run", target)
    config, weights = lft.read_run(target)
    config.training |= changes
    config.__dict__.update({name: changes[name] for name in {"start", "end", "solver", "k"} & changes.keys()})
    save_file(weights, target / "flow.safetensors", {"config": config.to_json_string(use_diff=False)})
    table = json.loads((target / "table.json").read_text())
    rows = [row | {"kl": row["kl"] + shift} for row in table["rows"]]
    (target / "table.json").write_text(json.dumps(table | {"rows": rows} | made))
    (target / "log.jsonl").write_text(json.dumps({"tokens": config.training["tokens"], "held_out_kl": shift}) + "\n")
    return target


def test_the_recoupling_ratio_is_that_of_the_best_of_all_pairings_with_most_own_pairs():
    found, pairings = set(), list(itertools.permutations(range(6)))
    for seed, copies in itertools.product(range(10), ([0, 1, 2, 3, 4, 5], [0, 0, 2, 3, 4, 4], [0, 0, 0, 0, 4, 5])):
        x0, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x0, x1 = (x0[copies], x0 + 1.5 * noise)[:: 1 if seed % 2 else -1]  # equal states before the span, or after it
        cost = torch.stack([(x0 - x1[list(pairing)]).square().sum() for pairing in pairings])
        best = [pairing for pairing, c in zip(pairings, cost) if c < cost.min() + 1e-9]
        own = max(sum(i == j for i, j in enumerate(pairing)) for pairing in best)
        assert spans.recoupling_ratio(x0, x1) == pytest.approx(1 - own / 6)
        found.add((len(best) > 1, own))
    assert {tied for tied, _ in found} == {True, False} and len(found) > 5


@pytest.mark.parametrize("kind, config", [(GPTNeoXForCausalLM, GPTNeoXConfig), (LlamaForCausalLM, LlamaConfig)])
def test_every_span_is_measured_between_the_states_of_the_library(monkeypatch, kind, config):
    torch.manual_seed(0)
    teacher, ids = kind(config(**OF_TEACHER)).eval().requires_grad_(False), torch.randint(20, (3, 16))  # many equal tokens
    states = list(teacher(ids, output_hidden_states=True).hidden_states)
    monkeypatch.setattr(lft.final_norm(teacher), "forward", lambda x: x)  # the library gives the last state after the norm
    states[6] = teacher(ids, output_hidden_states=True).hidden_states[6]
    ratio, moved, massive = spans.ratios(teacher, ids)
    for start, end in itertools.combinations(range(7), 2):
        pairs = list(zip(states[start], states[end]))
        assert ratio[start, end].item() == pytest.approx(sum(spans.recoupling_ratio(x0, x1) for x0, x1 in pairs) / 3, abs=1e-6)
        far = [sorted((b - a).norm().item() ** 2 for a, b in zip(x0, x1)) for x0, x1 in pairs]
        assert massive[start, end].item() == pytest.approx(sum(distances[-1] / sum(distances) for distances in far) / 3, rel=1e-4)
        far = [sorted(((b - a).norm() ** 2 / b.norm() ** 2).item() for a, b in zip(x0, x1)) for x0, x1 in pairs]
        assert moved[start, end].item() == pytest.approx(sum(distances[7] for distances in far) / 3, rel=1e-4)  # torch's median of 16
    assert ratio.isfinite().equal(torch.ones(6, 7).triu(1).bool())


def test_spans_names_the_best_span_and_compares_runs(capsys, tmp_path, monkeypatch, study):
    measured = torch.full((3, 6, 7), torch.nan)  # R, how far the state is moved, the largest share: of six layers, spans of two
    measured[:, range(5), range(2, 7)] = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.4], [0.1, 0.3, 0.2, 0.4, 0.5], [0.1] * 5])
    monkeypatch.setattr(spans, "ratios", lambda teacher, rows, title: measured if rows.shape == (4, 32) else None)
    runs = [like(study, tmp_path / str(start), kl, start=start, end=start + 2) for start, kl in ((0, 0.1), (2, 0.3), (4, 0.2))]
    options = ["--length", 2, "--teacher", study / "teacher", "--data", study / "text.txt", "--batch", 32, "--tokens", 128]
    status, printed, _ = run_study(capsys, spans, *options, "--picture", tmp_path / "map.png", "--compare", *runs, f"{runs[0]}/")
    assert status == 0 and (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("  layers") and ".." in line] == ["2..3", "1..2", "3..4", "4..5", "0..1"]
    assert "3 spans share the lowest R" in printed and "--start 2 --end 4" in printed
    # The KL ranks the runs 1, 3, 2; R 3, 1, 2 and how far they move 1, 2, 3. By hand: 1 - 6 (4 + 4 + 0) / (3 · 8), and with 0 + 1 + 1.
    assert "over 3 runs: of R -1.00, of how far the span moves the state 0.50" in printed
    (like(study, tmp_path / "old") / "log.jsonl").write_text('{"tokens": 1, "held_out_kl": 0.1}\n')
    wrong = [("--compare old", "not end in the score"), ("--compare none", "no run at"), ("--picture no/map.png", "not be written")]
    monkeypatch.chdir(tmp_path)
    for option, said in [*wrong, ("--length 7", "6 layers"), ("--length 0", "too small"), ("--batch 65", "--batch")]:
        assert said in run_study(capsys, spans, *options, *option.split())[2]
    monkeypatch.setattr(spans, "fingerprint", lambda teacher: "another")
    assert "is of another teacher" in run_study(capsys, spans, *options, "--compare", runs[0])[2]


def test_results_are_means_and_deviations_over_seeds_and_nothing_else(capsys, tmp_path, study, monkeypatch):
    monkeypatch.setattr(results, "SKIPPED", {3: 2})  # the paper's bars stand beside spans of six and twelve layers; these are of three
    kl = {row["name"]: row["kl"] for row in json.loads((study / "run/table.json").read_text())["rows"]}
    runs = [
        like(study, tmp_path / "a"), like(study, tmp_path / "b", 0.3, seed=1, out="b", save_every=7, device="cuda", compile=True),
        like(study, tmp_path / "c", 0.7, lr=0.01), like(study, tmp_path / "d", 0.8, lr=0.02, seed=5),
        like(study, tmp_path / "e", 0.9, method="fw", solver="midpoint", k=3, alpha=0.0, logit_weight=1.0),
        like(study, tmp_path / "f", 1.0, method="fw", solver="euler", k=1, alpha=0.1, logit_weight=0.0),
        like(study, tmp_path / "g", 1.1, method="l1", solver="midpoint", k=1),
    ]  # fmt: skip
    status, printed, errors = run_study(capsys, results, *runs, tmp_path / "e" / ".." / "a", "--pictures", tmp_path / "new" / "p")
    assert status == 0 and all((tmp_path / "new/p" / name).read_bytes().startswith(b"\x89PNG") for name in ("bars.png", "evaluations.png", "time.png", "tokens.png"))
    methods = results.grouped(results.with_methods([results.load_run(run) for run in runs[:2]]))[1, 4]
    bars = results.bars_of(methods, 2)  # the skips are of the table of the last run
    expected = {name: kl[name] + 0.3 for name in ("span dropped", "linear map", "skip 2, best inside span", "skip 2, mean inside span")}
    assert dict(bars) == pytest.approx(expected | {"flow matching": kl["LFT midpoint x1"] + 0.15}) and bars == sorted(bars, key=lambda bar: -bar[1])
    cells = {line.split(" | ")[1]: line.removesuffix(" |").split(" | ")[2:] for line in printed.splitlines()[2:]}
    rows = {name: row[:3] for name, row in cells.items()}
    assert len(rows) == len(printed.splitlines()) - 2  # no two say the same
    for name, evaluations in (("euler x1", 1), ("midpoint x3", 6)):
        shown, base = name.replace("x", "×"), kl[f"LFT {name}"]
        plain = "flow matching, 0.000512 M tokens, lr {}; " + shown
        assert rows[plain.format(0.015625)] == [str(evaluations), f"{base + 0.15:.4f} ± {0.3 / 2**0.5:.4f}", "2"]
        assert rows[plain.format(0.01)][1:] == [f"{base + 0.7:.4f}", "1"] and rows[plain.format(0.02)][1:] == [f"{base + 0.8:.4f}", "1"]
        assert rows[f"Flow Walking, midpoint ×3 + logits' KL, 0.000512 M tokens; {shown}"][1:] == [f"{base + 0.9:.4f}", "1"]
    assert rows["regression + 0.1 flow matching, 0.000512 M tokens; euler ×1"] == ["1", f"{kl['LFT euler x1'] + 1:.4f}", "1"]
    assert rows[f"l1, 0.000512 M tokens; {shown}"][1:] == [f"{base + 1.1:.4f}", "1"]  # a fork's own method
    table = {row["name"]: row for row in json.loads((study / "run/table.json").read_text())["rows"]}
    for name in ("span dropped", "skip 2, mean inside span"):
        row = table[name]
        assert cells[name][3:7] == ["–", f"{row['nmse']:.4f}", f"{row['perplexity']:.2f}", f"{row['top1_agreement']:.1%}"]  # of one document
        assert cells[name][7:] == [f"{row['prefill_time']:.2f}", f"{row['decode_time']:.2f}"]
    assert str(rows).count("regression") == 1  # it is made for no other number of steps
    assert rows.keys() >= {"span dropped", "linear map", "skip 2, best inside span", "skip 4, best anywhere"}
    millions = [like(study, tmp_path / f"m{n}", seed=n, tokens=12_345_678 + n) for n in (0, 1)]  # which round to the same
    printed = run_study(capsys, results, *millions, "--pictures", tmp_path)[1]
    assert f"| flow matching, 12.35 M tokens, tokens 12345679; euler ×1 | 1 | {kl['LFT euler x1']:.4f} | 1 |" in printed


def test_results_refuses_what_cannot_be_compared(capsys, tmp_path, study):
    good, stale = like(study, tmp_path / "good"), like(study, tmp_path / "stale", seed=2)
    config, weights = lft.read_run(stale)
    assert results.flow_in(config, weights) == lft.fingerprint(lft.load_student(stale)[0].flow)
    weights["time_mlp.0.bias"][3] += 1e-3
    save_file(weights, stale / "flow.safetensors", {"config": config.to_json_string(use_diff=False)})
    (like(study, tmp_path / "none") / "table.json").unlink()
    like(study, tmp_path / "seq_len", seq_len=16)
    for name in ("fingerprint", "data", "tokens", "twin"):
        like(study, tmp_path / name, made={name: "another"})
    wrong = {"stale": f"flow than the run holds now: python eval_kl.py {stale} --json {stale}/table.json", "none": "): python eval_kl.py"}
    wrong |= {"fingerprint": "different teachers", "data": "different texts", "tokens": "different texts", "seq_len": "different texts"}
    for name, said in (wrong | {"twin": "same options and seed", "nowhere": "no run at"}).items():
        status, printed, errors = run_study(capsys, results, good, tmp_path / name, "--pictures", tmp_path / "pictures")
        assert status == 2 and printed == "" and said in errors and errors.count("\n") == 1 and not (tmp_path / "pictures").exists(), errors


def test_a_run_on_stored_states_is_the_run_without(capsys, tmp_path, study, in_float32, monkeypatch):
    options = f"--seq-len 32 --teacher {study}/teacher --data {study}/text.txt".split()
    of_run = "--start 1 --end 4 --max-steps 3 --lr 0.001 --device cpu --out".split()
    pair = train_fm.hidden_pair
    assert run_study(capsys, train_fw, *options, *of_run, tmp_path / "plain")[0] == 0
    for name, layers, computed in (("filled", [], 4), ("read", ["--layers", 1, 4, "--rows", 40], 2)):  # of a step, and of what is said first
        calls = []
        monkeypatch.setattr(stored, "hidden_pair", lambda *args: calls.append(args) or pair(*args))
        assert run_study(capsys, stored, tmp_path / name / "states", "train_fw.py", *options, *layers, *of_run, tmp_path / name)[0] == 0
        monkeypatch.setattr(train_fm, "hidden_pair", pair)
        assert len(calls) == computed
        lines, expected = logged(tmp_path / name), logged(tmp_path / "plain")
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
        assert lines[-1]["held_out_kl"] == pytest.approx(expected[-1]["held_out_kl"], rel=1e-3)
    assert "another teacher, text or --seq-len" in run_study(capsys, stored, tmp_path / "read/states", *options, "--seq-len", 16, "--layers", 1)[2]


def test_the_losses_that_were_tried_are_what_they_say():
    error, x1 = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    squares, sizes = (error**2).mean(-1), (x1**2).mean(-1)
    torch.testing.assert_close(massive.rest(error, x1, 0.0), squares[:, 1:].mean())
    middle = sizes.flatten().sort().values[4]  # torch's median of ten
    torch.testing.assert_close(massive.median(error, x1, 0.0), sum(e / (s + middle) for e, s in zip(squares.flatten(), sizes.flatten())) / 10)


def test_a_drafter_leaves_the_teachers_text_and_its_drafts_are_counted(capsys, study):
    status, printed, _ = run_study(capsys, drafting, study / "run", "--skip", 1, "--first", 5, "--prompts", 2, "--tokens", 12)
    assert status == 0 and printed.count("2 of 2 texts") == 2 and printed.count(" writes:") == 3
    teacher, prompts = lft.load_teacher(f"{study}/teacher")[0], torch.randint(2048, (2, 8)).split(1)
    assert drafting.drafts(teacher, lft.share(teacher)[0], prompts, 12)[1:3] == (1.0, 6.0)  # its own drafter: five drafted and one more, twice


@pytest.mark.parametrize("name", speed.METHODS)
def test_the_floor_of_speed_is_what_training_multiplies(name):
    args, cpu = SimpleNamespace(width=32, heads=2, layers=5, start=1, end=4, batch_size=3, seq_len=64), torch.device("cpu")
    loss_of, solver, k, evaluations = speed.METHODS[name]
    training = speed.Training(args, cpu, loss_of, solver, k, compiled=False)
    lft.backbone(training.trunk).config._attn_implementation = training.u.layer.attention.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counted:
        training.forward_backward(torch.randint(50304, (3, 64)))
    floor = sum(2 * a.numel() * b.shape[-1] for a, b in speed.matrix_products(args, training.u.layer, evaluations, cpu))
    assert 1 < counted.get_total_flops() / floor < 1.03  # the rest is of the time embedding


def test_speed_prints_its_figures(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    shape = "--width 32 --heads 2 --layers 3 --end 2 --batch-size 2 --seq-len 8 --rounds 2 --device cpu".split()
    printed = run_study(capsys, speed, *shape)[1]
    assert printed.count("tokens per second") == printed.count("optimizers") == 4 and "GiB on cpu" in printed
    assert "no span" in run_study(capsys, speed, *shape, "--end", 4)[2] and "--width 32" in run_study(capsys, speed, *shape, "--heads", 3)[2]
