"""Tests, each against an independent truth: a closed form, the library's own output, or a computation by hand.

    python -m pytest -q test_lft.py

The environment variable KILLS says how often the run that is killed at random moments is killed (default 4).
"""
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
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

import numpy
import pytest
import torch
import transformers
import zstandard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import data
import eval_kl
import lft
import train_fm
import train_fw

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
def test_the_velocity_starts_as_the_layer(ids, family):
    teacher = random_teacher(family)
    for number, t in ((0, 0.0), (2, 0.37), (5, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1))):
        layer = lft.backbone(teacher).layers[number]
        x, context, expected = call_of(layer, teacher, ids)
        torch.testing.assert_close(x + lft.VelocityBlock(layer)(x, t, **context), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_pair_is_the_librarys_own_states(ids, family):
    teacher = random_teacher(family)
    states = teacher(ids, output_hidden_states=True).hidden_states
    for start, end in ((0, 1), (1, 4), (2, 6), (0, 6)):
        x0, x1, _ = lft.hidden_pair(lft.trunk_of(teacher, end), ids, start)
        assert torch.equal(x0, states[start])
        assert torch.equal(x1 if end < 6 else lft.final_norm(teacher)(x1), states[end])  # the library's last is after the norm


def test_the_training_pair_runs_no_layer_after_the_span(small, ids):
    trunk = lft.trunk_of(small, 4)
    assert len(lft.backbone(trunk).layers) == 4
    trunk.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the head was run"))
    lft.hidden_pair(trunk, ids, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_of_one_layer_gives_the_teachers_logits(ids, family):
    teacher = random_teacher(family)
    for layer in (0, 3, 5):
        config = lft.LFTConfig(teacher.config.to_dict(), layer, layer + 1, "euler", 1)
        student = lft.LFTForCausalLM(config, teacher).eval()
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=1e-5, rtol=1e-5)


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
        with pytest.raises(lft.InputError, match="rebuild"):
            lft.load_teacher(str(tmp_path))
    else:
        teacher, _ = lft.load_teacher(str(tmp_path))
        assert {weight.dtype for weight in teacher.parameters()} == {torch.float32} and not teacher.training
        assert not any(weight.requires_grad for weight in teacher.parameters())


# The velocity field


def test_the_velocity_is_the_formula_of_the_paper(small, ids):
    layer, t = lft.backbone(small).layers[2], 0.3
    velocity = randomize(lft.VelocityBlock(layer))
    x, context, _ = call_of(layer, small, ids)
    frequencies = torch.tensor([1000 ** (i / 63) for i in range(64)])
    time = torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)])
    first, _, last = velocity.time_mlp
    hidden = torch.nn.functional.silu(first.weight @ time + first.bias)
    b1, g1, a1, b2, g2, a2 = (last.weight @ hidden + last.bias).view(6, 32) + torch.tensor([0, 1, 1, 0, 1, 1])[:, None]
    attention = layer.attention(g1 * layer.input_layernorm(x) + b1, **context)[0]
    expected = a1 * attention + a2 * layer.mlp(g2 * layer.post_attention_layernorm(x) + b2)
    torch.testing.assert_close(velocity(x, t, **context), expected, atol=1e-4, rtol=1e-4)
    assert (expected - velocity(x, 0.8, **context)).abs().max() > 0.1  # and time matters


def test_each_sequence_has_its_own_time(small, ids):
    layer, times = lft.backbone(small).layers[2], [0.1, 0.5, 0.9]
    velocity = randomize(lft.VelocityBlock(layer))
    x, context, _ = call_of(layer, small, ids)
    together = velocity(x, torch.tensor(times).view(3, 1, 1), **context)
    for i, t in enumerate(times):
        torch.testing.assert_close(together[i : i + 1], velocity(x[i : i + 1], t, **context), atol=1e-4, rtol=1e-4)


def test_every_channel_of_the_time_embedding_varies_over_the_unit_interval(small, ids):
    layer = lft.backbone(small).layers[0]
    velocity, seen = lft.VelocityBlock(layer), []
    velocity.time_mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
    x, context, _ = call_of(layer, small, ids[:1, :1])
    for t in torch.linspace(0, 1, 1001).tolist():
        velocity(x, t, **context)
    channels = torch.stack(seen)
    assert channels.shape == (1001, 128) and (channels.amax(0) - channels.amin(0)).min() > 0.4


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


def test_uneven_times_by_hand():
    def velocity(x, t):
        return x * t

    t, x = torch.tensor([0.2, 0.6], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    # Euler from 0 to t changes nothing, as u(x, 0) = 0; from t to 1 it adds (1 - t) x t.
    torch.testing.assert_close(lft.integrate(velocity, x, [0.0, t, 1.0], "euler"), x * (1 + (1 - t) * t))
    # Midpoint from 0 to t evaluates at t/2, where the state is still x.
    y = x * (1 + t * t / 2)
    halfway = y * (1 + (1 - t) / 2 * t)
    torch.testing.assert_close(lft.integrate(velocity, x, [0.0, t, 1.0]), y + (1 - t) * halfway * (1 + t) / 2)


# The span replaced


@pytest.mark.parametrize("family", ["neox", "mistral"])
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
        assert torch.equal(skipping(ids).logits, rebuilt(ids).logits)
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_give_the_logits_of_unpadded_ones(ids, attention):
    teacher = random_teacher()
    teacher.set_attn_implementation(attention)
    student, lengths = student_of(teacher, 1, 5, "midpoint", 3), [20, 13, 1]
    logits = student(**left_padded(ids, lengths), use_cache=False).logits
    for row, n in enumerate(lengths):
        alone = student(ids[row : row + 1, 20 - n :], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, 20 - n :], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family, attention", [("neox", "sdpa"), ("neox", "eager"), ("mistral", "sdpa"), ("qwen3", "sdpa")])
def test_greedy_text_with_a_cache_is_that_of_whole_forward_passes(ids, family, attention, cache):
    teacher = random_teacher(family)
    teacher.set_attn_implementation(attention)
    for start, end, solver, k, lengths in ((0, 3, "euler", 2, [20, 20, 20]), (2, 6, "midpoint", 2, [20, 13, 7])):
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


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_student_drafts_for_its_teacher(small, ids, solver):
    student = student_of(small, 1, 4, solver, 1)
    for row in ids.split(1):
        alone = small.generate(row, max_new_tokens=20, do_sample=False)
        assert torch.equal(small.generate(row, max_new_tokens=20, do_sample=False, assistant_model=student), alone)


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


def test_flow_matching_loss_is_zero_for_the_true_velocity():
    x0, x1 = torch.randn(2, 8, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert train_fm.flow_matching_loss(lambda x, t: x1 - x0, x0, x1) == 0
    # A field that knows only x and t, and a target x1 = a x0 + b that lets it: x_t = (1 + t(a-1)) x0 + t b.
    a, b = 3.0, -0.7
    assert train_fm.flow_matching_loss(lambda x, t: (a - 1) * (x - t * b) / (1 + t * (a - 1)) + b, x0, a * x0 + b) < 1e-12


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
    loss = train_fw.flow_walking_loss(functools.partial(velocity, **context), x0, x1, k=k, solver=solver)
    torch.manual_seed(7)
    draws, squares = torch.rand(k - 1, 3, 1, 1), 0
    for i in range(3):  # one sequence after another
        x, t = x0[i : i + 1], torch.zeros(1, 1, 1)
        for s in [*draws[:, i : i + 1].sort(dim=0).values, torch.ones(1, 1, 1)]:
            slope = velocity(x, t, **context)
            if solver == "midpoint":
                slope = velocity(x + (s - t) / 2 * slope, (s + t) / 2, **context)
            x, t = x + (s - t) * slope, s
        squares = squares + ((x - x1[i : i + 1]) ** 2).sum()
    by_hand, weights = squares / x1.numel(), list(velocity.parameters())
    torch.testing.assert_close(loss, by_hand)
    for one, two in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(by_hand, weights)):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_the_hybrid_adds_alpha_times_flow_matching(small, ids):
    velocity = randomize(lft.VelocityBlock(small.gpt_neox.layers[2]))
    x0, x1, context = lft.hidden_pair(lft.trunk_of(small, 4), ids, 1)
    u = functools.partial(velocity, **context)
    torch.manual_seed(3)
    hybrid = train_fw.flow_walking_loss(u, x0, x1, alpha=0.1)
    torch.manual_seed(3)
    walking, matching = train_fw.flow_walking_loss(u, x0, x1), train_fm.flow_matching_loss(u, x0, x1)
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
