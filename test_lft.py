"""Tests, each against an independent truth: a closed form, the library's own output, or a computation by hand.

    python -m pytest test_lft.py

    python test_lft.py           # no test: prints how fast training is, over the same matrix products alone
"""
import argparse
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
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import zstandard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

import choose_span
import eval_kl
import lft
import results
import train_fm
import train_fw

HERE = Path(__file__).parent


def random_teacher(**options):
    """A small GPT-NeoX with random weights, large enough that every part of a layer matters."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0, **({"num_hidden_layers": 6} | options),
    )  # fmt: skip
    teacher = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    for name, weight in teacher.named_parameters():
        if name.endswith("bias") or "norm" in name:  # which the library starts at 0 and 1, where mistakes do not show
            weight += 0.2 * torch.randn_like(weight)
    return teacher


def random_velocity(teacher):
    """A velocity block whose weights all matter: its time vectors are not zero."""
    torch.manual_seed(1)
    velocity = lft.VelocityBlock(teacher.config, teacher.gpt_neox.layers[2])
    for weight in velocity.time_mlp[-1].parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return velocity.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small():
    return random_teacher()


@pytest.fixture(scope="session")
def tiny():
    """The embedded teacher and its tokenizer."""
    return lft.load_teacher("tiny_teacher")


@pytest.fixture
def ids():
    return torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(2))


# The velocity field


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("t", [0.0, 0.37, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1)])
def test_velocity_starts_as_the_teacher_layer(ids, parallel, t):
    teacher = random_teacher(use_parallel_residual=parallel)
    x, context = lft.embed(teacher, ids)
    for layer in teacher.gpt_neox.layers:
        u = lft.VelocityBlock(teacher.config, layer)(x, t, **context)
        torch.testing.assert_close(x + u, layer(x, **context))
        assert torch.equal(x + u, layer(x, **context)) or not parallel  # to the last bit, for Pythia's parallel layers


def test_velocity_is_the_formula_of_the_paper(small, ids):
    velocity, t = random_velocity(small), 0.3
    x, context = lft.embed(small, ids)
    frequencies = torch.tensor([1000 ** (i / 63) for i in range(64)])
    time = torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)])
    first, _, last = velocity.time_mlp
    hidden = torch.nn.functional.silu(first.weight @ time + first.bias)
    b1, g1, a1, b2, g2, a2 = (last.weight @ hidden + last.bias).view(6, 32) + torch.tensor([0, 1, 1, 0, 1, 1])[:, None]
    layer = copy.deepcopy(small.gpt_neox.layers[2])
    attention = layer.attention(g1 * layer.input_layernorm(x) + b1, **context)[0]
    expected = a1 * attention + a2 * layer.mlp(g2 * layer.post_attention_layernorm(x) + b2)
    torch.testing.assert_close(velocity(x, t, **context), expected)
    assert (expected - velocity(x, 0.8, **context)).abs().max() > 0.1  # and time matters


def test_every_channel_of_the_time_embedding_varies_over_the_unit_interval(small):
    angles = torch.linspace(0, 1, 1001)[:, None] * lft.VelocityBlock(small.config).frequencies
    for channels in (angles.sin(), angles.cos()):
        assert (channels.amax(0) - channels.amin(0)).min() > 0.4


def test_each_sequence_has_its_own_time(small, ids):
    velocity = random_velocity(small)
    x, context = lft.embed(small, ids)
    times = [0.1, 0.5, 0.9]
    together = velocity(x, torch.tensor(times).view(3, 1, 1), **context)
    for i, t in enumerate(times):
        torch.testing.assert_close(together[i : i + 1], velocity(x[i : i + 1], t, **context))


# The solvers


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2)])
def test_solvers_have_their_order(solver, order):
    def velocity(x, t):  # dx/dt = (1 + 2t) x is solved by x(t) = x(0) exp(t + t²)
        return (1 + 2 * t) * x

    x0 = torch.tensor([[1.0], [-0.5]], dtype=torch.float64)
    errors = [
        (lft.integrate(velocity, x0, lft.even_times(k), solver) - x0 * math.exp(2)).abs().max().item() for k in (64, 128, 256)
    ]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


def test_uneven_times_by_hand():
    def velocity(x, t):
        return x * t

    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # Euler from 0 to t changes nothing, as u(x, 0) = 0; from t to 1 it adds (1 - t) x t.
    torch.testing.assert_close(lft.integrate(velocity, x, [0.0, t, 1.0], "euler"), x * (1 + (1 - t) * t))
    # Midpoint from 0 to t evaluates at t/2, where the state is still x.
    y = x * (1 + t * t / 2)
    halfway = y * (1 + (1 - t) / 2 * t)
    torch.testing.assert_close(lft.integrate(velocity, x, [0.0, t, 1.0]), y + (1 - t) * halfway * (1 + t) / 2)


# The teacher and the student


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("start, end", [(0, 1), (0, 6), (2, 4), (5, 6)])
def test_hidden_pair_is_transformers_own(ids, start, end, attention):
    teacher = random_teacher()
    teacher.set_attn_implementation(attention)
    states = teacher(ids, output_hidden_states=True).hidden_states[:-1]  # the last is after the final norm
    before_norm = []
    handle = teacher.gpt_neox.final_layer_norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    teacher(ids)
    handle.remove()
    states = [*states, *before_norm]
    x0, x1, _ = lft.hidden_pair(teacher, ids, start, end)
    assert torch.equal(x0, states[start]) and torch.equal(x1, states[end])


def test_hidden_pair_runs_no_layer_after_the_span(small, ids):
    teacher = copy.deepcopy(small)
    for part in (*teacher.gpt_neox.layers[4:], teacher.gpt_neox.final_layer_norm, teacher.get_output_embeddings()):
        part.register_forward_pre_hook(lambda *_: pytest.fail("a layer after the span was run"))
    lft.hidden_pair(teacher, ids, 1, 4)


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_flow_of_one_layer_gives_the_teachers_logits(small, ids, layer):
    velocity = lft.VelocityBlock(small.config, small.gpt_neox.layers[layer])
    student = lft.replace_span(small, layer, layer + 1, lft.FlowLayer(velocity, layer, layer + 1, "euler", 1))
    assert torch.equal(student(ids).logits, small(ids).logits)


@pytest.mark.parametrize("start, end", [(0, 2), (2, 5), (4, 6), (0, 6)])
def test_skipping_equals_a_model_rebuilt_without_those_layers(small, ids, start, end):
    config = copy.deepcopy(small.config)
    config.num_hidden_layers = 6 - (end - start)
    rebuilt = GPTNeoXForCausalLM(config).eval()
    kept = [layer for layer in range(6) if not start <= layer < end]
    weights = {name: weight for name, weight in small.state_dict().items() if ".layers." not in name}
    for new, old in enumerate(kept):
        for name, weight in small.gpt_neox.layers[old].state_dict().items():
            weights[f"gpt_neox.layers.{new}.{name}"] = weight
    rebuilt.load_state_dict(weights)
    assert torch.equal(lft.replace_span(small, start, end)(ids).logits, rebuilt(ids).logits)


def test_the_teacher_is_shared_and_untouched(small, ids):
    before, logits = lft.fingerprint(small), small(ids).logits
    student = lft.replace_span(small, 1, 4, lft.FlowLayer(random_velocity(small), 1, 4, "euler", 2))
    student(ids)
    lft.replace_span(small, 0, 4)(ids)
    assert lft.fingerprint(small) == before and torch.equal(small(ids).logits, logits)
    assert len(small.gpt_neox.layers) == small.config.num_hidden_layers == 6
    theirs = {id(weight) for weight in small.parameters()}
    own = [name for name, weight in student.named_parameters() if id(weight) not in theirs]
    assert own and all(name.startswith("gpt_neox.layers.1.velocity") for name in own)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("solver, steps, start, end", [("euler", 2, 0, 3), ("midpoint", 3, 1, 5), (None, None, 2, 6)])
def test_padded_rows_give_the_logits_of_unpadded_ones(ids, attention, side, solver, steps, start, end):
    teacher = random_teacher()
    teacher.set_attn_implementation(attention)
    flow = solver and lft.FlowLayer(random_velocity(teacher), start, end, solver, steps)
    student = lft.replace_span(teacher, start, end, flow)
    lengths = [20, 13, 1]
    mask = torch.stack([torch.arange(20) < n for n in lengths])
    mask = (mask.flip(1) if side == "left" else mask).long()
    padded = torch.full_like(ids, 5)
    for i, n in enumerate(lengths):
        padded[i, mask[i].bool()] = ids[i, :n]
    logits = student(padded, attention_mask=mask, use_cache=False).logits
    for i, n in enumerate(lengths):
        alone = student(ids[i : i + 1, :n], use_cache=False).logits[0]
        torch.testing.assert_close(logits[i, mask[i].bool()], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver, steps, start, end", [("euler", 3, 0, 3), ("midpoint", 1, 1, 5), (None, None, 0, 2)])
def test_cached_logits_equal_uncached_ones(small, ids, solver, steps, start, end):
    flow = solver and lft.FlowLayer(random_velocity(small), start, end, solver, steps)
    student = lft.replace_span(small, start, end, flow)
    cache = DynamicCache(config=student.config)
    parts = [student(part, past_key_values=cache, use_cache=True).logits for part in ids.split([11, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), student(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_a_cache_without_slots_enough_is_refused(small, ids):
    student = lft.replace_span(small, 1, 4, lft.FlowLayer(random_velocity(small), 1, 4, "midpoint", 2))
    with pytest.raises(lft.InputError, match="evaluates the velocity 4 times and the replaced layers leave 3 cache slots"):
        student(ids, use_cache=True)
    with pytest.raises(lft.InputError, match="cache slots"):
        student.generate(ids, max_new_tokens=2)
    # A plain call asks for no cache then, and for one again when there are slots enough.
    assert torch.equal(student(ids).logits, student(ids, use_cache=False).logits) and student(ids).past_key_values is None
    student.set_flow("euler", 3)
    assert student(ids).past_key_values.get_seq_length() == ids.shape[1]


def test_time_vectors_are_kept_at_inference_until_a_weight_changes(small, ids):
    x, context = lft.embed(small, ids)
    velocity = random_velocity(small)
    calls = []
    velocity.time_mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        before = [velocity(x, t, **context) for t in (0.0, 0.5, 0.0, 0.5)]
        assert len(calls) == 2 and torch.equal(before[0], before[2]) and torch.equal(before[1], before[3])
        other = copy.deepcopy(velocity)
        other.time_mlp[0].bias.add_(1.0)
        assert not torch.equal(other(x, 0.5, **context), before[1])
        other.load_state_dict(velocity.state_dict())
        assert torch.equal(other(x, 0.5, **context), before[1])
        with torch.autocast("cpu", torch.bfloat16):
            velocity(x, 0.5, **context)
        assert torch.equal(velocity(x, 0.5, **context), before[1])  # not what autocast rounded
    velocity.requires_grad_(True)
    optimizer = torch.optim.AdamW(velocity.parameters(), lr=0.1, fused=True)
    for _ in range(2):  # while it is trained, nothing is kept
        velocity(x, 0.5, **context).sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(velocity(x, 0.5, **context), velocity(x, torch.tensor(0.5), **context))



def test_a_later_setting_of_the_teacher_leaves_the_student_alone(ids):
    teacher = random_teacher()
    student = lft.replace_span(teacher, 1, 4, lft.FlowLayer(random_velocity(teacher), 1, 4, "euler", 2))
    logits = student(ids).logits
    teacher.set_attn_implementation("eager")  # whose masks mean something else: a flow that followed would see the future
    assert torch.equal(student(ids).logits, logits)
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("sdpa")
    torch.testing.assert_close(student(ids).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start, end", [(3, 3), (4, 2), (-1, 2), (0, 7)])
def test_a_span_outside_the_model_is_refused(small, start, end):
    with pytest.raises(lft.InputError, match="this teacher's 6 layers"):
        lft.replace_span(small, start, end)


# The losses


def test_flow_matching_loss_is_zero_for_the_true_velocity():
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    assert train_fm.flow_matching_loss(lambda x, t: x1 - x0, x0, x1) == 0
    # A field that knows only x and t, and a target x1 = a x0 + b that lets it: x_t = (1 + t(a-1)) x0 + t b.
    a, b = 3.0, -0.7
    field = lambda x, t: (a - 1) * (x - t * b) / (1 + t * (a - 1)) + b
    assert train_fm.flow_matching_loss(field, x0, a * x0 + b) < 1e-12


def test_flow_matching_loss_where_paths_cross_is_the_conditional_variance():
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 400_000, 1, 1, dtype=torch.float64)  # independent: x_t tells little of where it came from
    # Of x1 - x0, given x_t, the mean is (2t-1) x_t / (t²+(1-t)²) and the variance 1 / (t²+(1-t)²): on average π/2.
    best = lambda x, t: (2 * t - 1) * x / (t**2 + (1 - t) ** 2)
    assert train_fm.flow_matching_loss(best, x0, x1).item() == pytest.approx(math.pi / 2, rel=0.01)


@pytest.mark.parametrize("power, median", [(None, 0.5), (1.0, 0.5), (3.0, 0.125)])
def test_times_of_flow_matching_are_one_a_sequence_and_uniform_unless_asked_otherwise(power, median):
    seen = []
    x0 = torch.zeros(20_000, 2, 1)
    torch.manual_seed(0)
    more = {} if power is None else {"time_power": power}
    train_fm.flow_matching_loss(lambda x, t: seen.append((x, t)) or x, x0, x0 + 1, **more)
    x, t = seen[0]
    assert torch.equal(x, t.expand_as(x))  # x_t on the path from 0 to 1 is t itself
    quarters = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    quantiles = t.flatten().quantile(quarters)
    torch.testing.assert_close(quantiles, quarters if median == 0.5 else quarters**3, atol=0.02, rtol=0)
    assert quantiles[2].item() == pytest.approx(median, abs=0.02)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_gradient_of_flow_walking_is_that_of_a_loop_by_hand(double_precision, ids, solver, steps):
    teacher = random_teacher()
    velocity = random_velocity(teacher).requires_grad_(True)
    x0, x1, context = lft.hidden_pair(teacher, ids, 1, 4)

    def u(x, t):
        return velocity(x, t, **context)

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(velocity.parameters()))])

    torch.manual_seed(7)
    loss = train_fw.flow_walking_loss(u, x0, x1, steps, solver)
    torch.manual_seed(7)
    draws = torch.rand(steps - 1, 3, 1, 1)
    squares = 0
    for i in range(3):  # one sequence after another
        x, t = x0[i : i + 1], 0.0
        for s in [*sorted(draws[:, i].flatten().tolist()), 1.0]:
            k = velocity(x, t, **context)
            if solver == "midpoint":
                k = velocity(x + (s - t) / 2 * k, (s + t) / 2, **context)
            x, t = x + (s - t) * k, s
        squares = squares + ((x - x1[i : i + 1]) ** 2).sum()
    by_hand = squares / x1.numel()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(gradient(loss), gradient(by_hand))


def test_the_hybrid_adds_alpha_times_flow_matching(small, ids):
    velocity = random_velocity(small)
    x0, x1, context = lft.hidden_pair(small, ids, 1, 4)
    u = lambda x, t: velocity(x, t, **context)
    torch.manual_seed(3)
    hybrid = train_fw.flow_walking_loss(u, x0, x1, alpha=0.1)
    torch.manual_seed(3)
    walking = train_fw.flow_walking_loss(u, x0, x1)
    matching = train_fm.flow_matching_loss(u, x0, x1)
    torch.testing.assert_close(hybrid, walking + 0.1 * matching)
    assert matching > 0


@pytest.mark.parametrize("end", [4, 6])
def test_the_logit_term_is_the_kl_between_the_models_logits(script, tmp_path, monkeypatch, teacher_folder, text, end):
    """A flow that starts from a layer is, in one Euler step, that layer: its first loss is that of a model of 7 - (end - 1) layers."""
    monkeypatch.setattr(train_fm, "autocast", lambda device: contextlib.nullcontext())
    losses = []
    for weight in (0, 2):
        options = ["--solver", "euler", "--steps", 1, "--max-steps", 1, "--init", 2, "--end", end, "--logit-weight", weight]
        assert script(train_fw, "--out", tmp_path / f"{weight}", *options)[0] == 0
        losses.append(logged(tmp_path / f"{weight}")[0]["loss"])
    teacher, tokenizer = lft.load_teacher(teacher_folder)
    ids = next(lft.token_batches(str(text), tokenizer, 8, 32, seed=0))
    short = copy.deepcopy(teacher)
    short.gpt_neox.layers = torch.nn.ModuleList(teacher.gpt_neox.layers[i] for i in (0, 2, *range(end, 6)))
    with torch.no_grad():
        p, q = (model(ids, use_cache=False).logits.double().softmax(-1) for model in (teacher, short))
    kl = (p * (p / q).log()).sum(-1).mean().item()
    assert kl > 0.01 and losses[1] - losses[0] == pytest.approx(2 * kl, rel=1e-4)


def test_the_logit_term_has_its_gradient_from_the_student_alone(small, ids):
    """Against finite differences of the walk's end, through a teacher whose weights want no gradient."""
    x0, x1, context = lft.hidden_pair(small, ids, 1, 4)
    logit_kl = functools.partial(train_fm.logit_kl, small, 4, context)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def term(shift):
        u = lambda x, t: x1 - x0 + shift
        walk = functools.partial(train_fw.flow_walking_loss, u, x0, x1, steps=1, solver="euler")
        return walk(logit_weight=1.0, logit_kl=logit_kl) - walk()

    (gradient,) = torch.autograd.grad(term(shift), shift)
    with torch.no_grad():
        step = 0.02 * gradient / gradient.norm()
        slope = (term(shift + step) - term(shift - step)) / 0.04
    assert slope > 0 and slope.item() == pytest.approx(gradient.norm().item(), rel=1e-2)


# The evaluation


def test_scores_do_not_depend_on_how_many_sequences_are_taken_at_once(small, monkeypatch):
    sequences = torch.randint(97, (6, 24), generator=torch.Generator().manual_seed(3))
    scores = []
    for at_once in (2**26, 1):
        monkeypatch.setattr(eval_kl, "LOGITS_AT_ONCE", at_once)
        scores.append(eval_kl.evaluate(small, sequences, 4, {"skip": eval_kl.skip_row(1, 2, 4)})["skip"])
    for measure, values in scores[0].items():
        torch.testing.assert_close(values, scores[1][measure], rtol=1e-4, atol=1e-6)


def test_one_sequence_has_no_standard_error(small):
    sequences = torch.arange(24)[None]
    row = {"dropped": eval_kl.skip_row(1, 2, 3)}
    summary = eval_kl.summarise(eval_kl.evaluate(small, sequences, 3, row)["dropped"])
    assert summary["kl_stderr"] is None and summary["kl"] > 0 and "±" not in eval_kl.kl_text(summary)


def test_kl_equals_a_double_precision_reference():
    torch.manual_seed(0)
    teacher, student = 10 * torch.randn(2, 4, 7, 500)
    p, q = (logits.double().softmax(-1).numpy() for logits in (teacher, student))
    reference = torch.from_numpy((p * (torch.from_numpy(p).log().numpy() - torch.from_numpy(q).log().numpy())).sum(-1))
    def kl_of(*logits):
        return eval_kl.kl_divergence(*map(eval_kl.log_probabilities, logits))

    kl = kl_of(teacher, student)
    assert kl.dtype == torch.float32 and kl.shape == (4, 7)
    torch.testing.assert_close(kl.double(), reference, rtol=1e-5, atol=1e-6)
    halves = teacher.half(), student.half()
    assert torch.equal(kl_of(*halves), kl_of(*(logits.float() for logits in halves)))
    # Two coins by hand, and which way round: KL(teacher || student).
    coin = eval_kl.kl_divergence(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.9, 0.1]]]).log())
    assert coin.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)


def weights_in(module):
    return sum(weight.numel() for weight in module.parameters())


def test_times_are_taken_in_turn_and_over_the_first_models_of_the_same_round(small, monkeypatch):
    """On a clock of its own: the machine is twice as slow in every other round, and the first round three times."""
    clock, turns = [0.0], []
    monkeypatch.setattr(eval_kl.time, "perf_counter", lambda: clock[0])

    def step(model, number):
        turns.append(number)
        clock[0] += (1.0, 0.5, 3.0)[number] * (3 if len(turns) <= 3 else 1 + (len(turns) - 1) // 3 % 2)

    assert eval_kl.times_over_first([small] * 3, step) == pytest.approx([1, 0.5, 3])
    assert turns == [0, 1, 2] * (eval_kl.TIMED_ROUNDS + 1)


@pytest.mark.parametrize("start, end", [(0, 6), (0, 1), (5, 6)])
def test_a_table_for_a_span_at_an_end_of_the_model(small, start, end):
    sequences = torch.randint(97, (8, 12), generator=torch.Generator().manual_seed(3))
    rows = {row["name"]: row for row in eval_kl.table(small, random_velocity(small), sequences, start, end)}
    assert all(row["prefill_time"] > 0 for row in rows.values())
    assert rows["span dropped"]["ideal_time"] == pytest.approx((6 - (end - start)) / 6)


class LinearLayer(torch.nn.Linear):
    def forward(self, x, **context):
        return super().forward(x)


def with_linear_layer(teacher, start, end, linear):
    """A copy of the teacher in which a linear layer stands where layers [start, end) stood."""
    model = copy.deepcopy(teacher)
    layer = LinearLayer(*linear.weight.shape)
    layer.load_state_dict(linear.state_dict())
    model.gpt_neox.layers = torch.nn.ModuleList([*model.gpt_neox.layers[:start], layer, *model.gpt_neox.layers[end:]])
    return model


@pytest.mark.parametrize("start, end", [(0, 6), (1, 4), (5, 6)])
def test_the_linear_map_is_that_of_least_squares(small, ids, start, end):
    batches = torch.randint(97, (6, 4, 24), generator=torch.Generator().manual_seed(4))
    linear = eval_kl.fit_linear(small, batches, start, end)
    x0, x1, _ = lft.hidden_pair(small, batches.flatten(0, 1), start, end)
    x0, x1 = x0.flatten(0, 1).double().numpy(), x1.flatten(0, 1).double().numpy()
    expected = numpy.linalg.lstsq(numpy.c_[x0, numpy.ones(len(x0))], x1, rcond=None)[0]
    assert linear.weight.numpy() == pytest.approx(expected[:-1].T, abs=1e-4)
    assert linear.bias.numpy() == pytest.approx(expected[-1], abs=1e-4)
    logits = eval_kl.linear_model(small, start, end, linear)(ids, use_cache=False).logits
    assert torch.allclose(logits, with_linear_layer(small, start, end, linear)(ids, use_cache=False).logits, atol=1e-5)


def test_the_table_scores_the_student_itself(small):
    """Every row, whose states are shared, against the logits of a whole model, by transformers and in double precision."""
    sequences = torch.randint(97, (16, 24), generator=torch.Generator().manual_seed(3))
    velocity, start, end, linear = random_velocity(small), 1, 4, torch.nn.Linear(32, 32).requires_grad_(False)
    rows = {row["name"]: row for row in eval_kl.table(small, velocity, sequences, start, end, linear=linear)}
    teacher_logits = small(sequences, use_cache=False).logits.double()

    def expect(row, model, n=16):
        logits = model(sequences[:: 16 // n], use_cache=False).logits.double()
        p = teacher_logits[:: 16 // n].softmax(-1)
        kl = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean(1)
        nll = -logits[:, :-1].log_softmax(-1).gather(-1, sequences[:: 16 // n, 1:, None]).mean()
        assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-6)
        assert row["kl_stderr"] == pytest.approx((kl.var(unbiased=True) / n).sqrt().item(), rel=1e-3, abs=1e-6)
        assert row["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
        agreement = (logits.argmax(-1) == teacher_logits[:: 16 // n].argmax(-1)).double().mean().item()
        assert row["top1_agreement"] == pytest.approx(agreement, abs=1e-6)
        return kl.mean().item()

    assert rows["teacher"]["tokens"] == 16 * 24 and rows["skip 1, mean inside span"]["tokens"] == 2 * 24
    expect(rows["teacher"], small)
    assert rows["teacher"]["prefill_time"] == rows["teacher"]["decode_time"] == rows["teacher"]["ideal_time"] == 1
    assert rows["teacher"]["kl"] == 0 and rows["teacher"]["nmse"] == 0 and rows["teacher"]["top1_agreement"] == 1
    for solver in ("euler", "midpoint"):
        for steps in (1, 2, 3, 8):
            row = rows[f"LFT {solver} x{steps}"]
            flow = lft.FlowLayer(velocity, start, end, solver, steps)
            expect(row, lft.replace_span(small, start, end, flow))
            assert row["layers_replaced"] == "1..3" and row["evaluations"] == steps * (2 if solver == "midpoint" else 1)
            assert row["ideal_time"] == pytest.approx((3 + row["evaluations"]) / 6)
            assert (row["decode_time"] is None) == (row["evaluations"] > 3)
            removed, added = small.gpt_neox.layers[1:4], velocity
            assert row["parameters"] == sum(p.numel() for p in small.parameters()) - weights_in(removed) + weights_in(added)
            x0, x1, context = lft.hidden_pair(small, sequences, start, end)
            nmse = ((flow(x0, **context) - x1).double().square().sum() / x1.double().square().sum()).item()
            assert row["nmse"] == pytest.approx(nmse, rel=1e-4)
    expect(rows["span dropped"], lft.replace_span(small, start, end))
    expect(rows["linear map"], with_linear_layer(small, start, end, linear))
    assert rows["linear map"]["parameters"] == rows["span dropped"]["parameters"] + 32 * 33

    for n in (1, 2, 3, 4):
        ranked = {}
        for first in range(6 - n + 1):
            model = lft.replace_span(small, first, first + n)
            p = teacher_logits[::10].softmax(-1)
            q = model(sequences[::10], use_cache=False).logits.double().log_softmax(-1)
            ranked[first] = (p * (p.log() - q)).sum(-1).mean().item()
        inside = {first: kl for first, kl in ranked.items() if start <= first and first + n <= end}
        for where, candidates in (("anywhere", ranked), ("inside span", inside)):
            if candidates:
                best, row = min(candidates, key=candidates.get), rows[f"skip {n}, best {where}"]
                assert row["layers_replaced"] == f"{best}..{best + n - 1}"
                expect(row, lft.replace_span(small, best, best + n))
            assert row["ideal_time"] == pytest.approx((6 - n) / 6)
        assert (f"skip {n}, best inside span" in rows) == (f"skip {n}, mean inside span" in rows) == (n <= 3)
        if inside:
            assert rows[f"skip {n}, mean inside span"]["kl"] == pytest.approx(sum(inside.values()) / len(inside), rel=1e-4)


@pytest.mark.parametrize("first, n, layers_left", [(0, 1, [1, 2, 3]), (1, 2, [0, 3]), (3, 2, [0, 1, 2]), (4, 2, [0, 1, 2, 3]), (5, 1, [0, 1, 2, 3]), (2, 4, [0, 1])])
def test_the_state_at_end_where_layers_are_skipped(small, ids, first, n, layers_left):
    """NMSE is of the state entering layer `end`, here 4, whether the gap lies before, across or after it."""
    x, context = lft.embed(small, ids)
    states = [x]
    for layer in small.gpt_neox.layers:
        states.append(layer(states[-1], **context))
    expected = x
    for index in layers_left:
        expected = small.gpt_neox.layers[index](expected, **context)
    assert torch.equal(eval_kl.skip_row(first, n, 4)(small, states, context)[0], expected)


# Text


class Letters:
    """A tokenizer that a test can read: one token a letter."""

    eos_token_id = 0

    def __call__(self, text, verbose=False):
        if isinstance(text, list):
            return {"input_ids": [self(each)["input_ids"] for each in text]}
        return {"input_ids": [ord(letter) for letter in text]}


def test_documents_are_joined_by_end_of_text_and_cut_into_full_sequences():
    sequences = list(lft.token_sequences(["abc", "", "defgh", "ij"], Letters(), 4))
    text = "".join(chr(token) for sequence in sequences for token in sequence).replace("\0", "|")
    assert [len(sequence) for sequence in sequences] == [4, 4, 4] and text == "abc||defgh|i"


def test_the_files_held_out_stay_the_same():
    """The embedded teacher has never seen these: another split would score it on what it was trained on."""
    names = ["argparse.py", "asyncio/events.py", "codecs.py", "dataclasses.py", "email/parser.py", "functools.py", "heapq.py"]
    held_out = ["asyncio/events.py", "codecs.py", "email/parser.py", "functools.py"]
    assert [name for name in names if lft.is_held_out(name)] == held_out


def test_stdlib_is_split_by_file(monkeypatch):
    train, held_out = (list(lft.stdlib_documents(split)) for split in ("train", "held-out"))
    assert not set(train) & set(held_out) - {""}
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
    library = Path(os.__file__).parent
    source = (library / "argparse.py").read_text()
    assert (source in held_out, source in train) == (lft.is_held_out("argparse.py"), not lft.is_held_out("argparse.py"))
    monkeypatch.setattr(lft, "is_held_out", lambda name: True)
    everything = set(lft.stdlib_documents("held-out"))
    assert set(train) | set(held_out) == everything and not list(lft.stdlib_documents("train"))
    assert not any("import unittest" in text and "class TestCase(unittest.TestCase" in text for text in everything)


def test_local_files_are_split_within_each_file(tmp_path):
    texts = ["a" * 190 + "b" * 10, "c" * 95 + "d" * 5]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    pattern = str(tmp_path / "*.txt")
    assert list(lft.documents(pattern, "train")) == ["a" * 190, "c" * 95]
    assert list(lft.documents(pattern, "held-out")) == ["b" * 10, "d" * 5]
    assert list(lft.documents(str(tmp_path / "1.txt"), "held-out")) == ["d" * 5]


def test_a_pass_over_local_text_holds_every_sequence_once_in_an_order_of_its_own(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i // 4 % 26) for i in range(100)) + "." * 10)  # 26 sequences: aaaa bbbb … yyyy, then dots
    batches = lft.token_batches(str(path), Letters(), 13, 4, seed=0)
    one, two = (torch.cat([next(batches), next(batches)]) for _ in range(2))
    expected = {tuple(sequence.tolist()) for sequence in lft.token_sequences(lft.documents(str(path), "train"), Letters(), 4)}
    assert len(expected) == 26
    for epoch in (one, two):
        assert {tuple(sequence.tolist()) for sequence in epoch} == expected
    assert not torch.equal(one, two)
    again = lft.token_batches(str(path), Letters(), 13, 4, seed=0)
    assert torch.equal(next(again), one[:13])
    assert not torch.equal(next(lft.token_batches(str(path), Letters(), 13, 4, seed=1)), one[:13])


def first_letters(sequences):
    return "".join(chr(sequence[0]) for sequence in sequences)


def test_held_out_tokens_are_spread_over_the_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("." * 1900 + "".join(letter * 10 for letter in "abcdefghij"))
    assert first_letters(lft.held_out_tokens(str(path), Letters(), 10)) == "acegj"  # for validation at most half
    assert first_letters(lft.held_out_tokens(str(path), Letters(), 10, 30)) == "bfi"
    assert first_letters(lft.held_out_tokens(str(path), Letters(), 10, 10_000)) == "bdfhi"
    with pytest.raises(lft.InputError, match="one held-out sequence of 100 tokens, which is for validation"):
        lft.held_out_tokens(str(path), Letters(), 100, 100)


def write_shard(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(zstandard.compress(lines.encode()))


def test_a_hub_data_set_is_streamed_with_its_own_splits(tmp_path, monkeypatch):
    """The loading code of the hub's data sets, on a folder laid out like monology/pile-uncopyrighted."""
    write_shard(tmp_path / "train" / "00.jsonl.zst", ["abcd", "efgh"])
    write_shard(tmp_path / "train" / "01.jsonl.zst", ["ijkl"])
    write_shard(tmp_path / "val.jsonl.zst", ["mnop"])
    write_shard(tmp_path / "test.jsonl.zst", ["qrst"])
    assert list(lft.hub_documents(str(tmp_path), "train")) == ["abcd", "efgh", "ijkl"]
    assert list(lft.hub_documents(str(tmp_path), "held-out")) == ["mnop"]
    write_shard(tmp_path / "val.jsonl.zst", ["a" * 9, "b" * 9, "c" * 9, "d" * 9])
    assert first_letters(lft.held_out_tokens(str(tmp_path), Letters(), 10)) == "ac"  # for validation, the others for a test
    assert first_letters(lft.held_out_tokens(str(tmp_path), Letters(), 10, 10)) == "b"
    batches = lft.token_batches(str(tmp_path), Letters(), 2, 5, seed=0)
    text = "".join(chr(token) for _ in range(3) for token in next(batches).flatten())
    assert text.replace("\0", "|") == "abcd|efgh|ijkl|" * 2  # its own order, one pass after another
    (tmp_path / "val.jsonl.zst").unlink()
    assert list(lft.hub_documents(str(tmp_path), "held-out")) == ["qrst"]
    (tmp_path / "test.jsonl.zst").unlink()
    with pytest.raises(lft.InputError, match="has no validation or test split"):
        list(lft.hub_documents(str(tmp_path), "held-out"))


# Runs: saving, loading, and the scripts


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """The small random teacher as a folder, with the embedded teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    config = GPTNeoXConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    lft.load_teacher("tiny_teacher")[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file that is quickly read."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((HERE / "lft.py").read_text())
    return path


@pytest.fixture
def script(monkeypatch, capsys, teacher_folder, text):
    """Run a script's main as its command would; returns exit status, standard output and standard error."""

    def run(module, *options):
        options = [str(option) for option in options]
        defaults = {} if module is results else {"--device": "cpu"}
        if module in (train_fm, train_fw) and "--resume" not in options:
            defaults |= {"--teacher": teacher_folder, "--data": text, "--start": 1, "--end": 4, "--max-steps": 3}
        for name, value in defaults.items():
            options += [] if name in options else [name, str(value)]
        monkeypatch.setattr(sys, "argv", [module.__name__, *options])
        capsys.readouterr()
        try:
            lft.run_script(module.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def printed_kl(printed, row):
    """The KL that a training script printed for a row of its last lines."""
    return float(next(line for line in printed.splitlines() if line.strip().startswith(row)).split("KL ")[1].split()[0])


@pytest.mark.parametrize("module, solver, steps", [(train_fm, "midpoint", 1), (train_fw, "midpoint", 3)])
def test_a_run_is_saved_loaded_and_scored(script, tmp_path, module, solver, steps, teacher_folder, text):
    out = tmp_path / "run"
    status, trained, _ = script(module, "--out", out)
    lines = trained.splitlines()
    assert status == 0
    assert lines[0] == f"teacher {teacher_folder}, data {text}, on cpu: one flow replaces layers 1..3, 3 of 6"
    assert str(out) in lines[-1]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "flow.json", "flow.safetensors", "log.jsonl"]
    info = json.loads((out / "flow.json").read_text())
    assert (info["start"], info["end"], info["solver"], info["steps"], info["trained_steps"]) == (1, 4, solver, steps, 3)

    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    velocity, _ = lft.load_flow(out, teacher)
    weights = load_file(out / "flow.safetensors")
    assert weights.keys() == velocity.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in velocity.state_dict().items())
    assert not torch.equal(velocity.layer.mlp.dense_h_to_4h.weight, teacher.gpt_neox.layers[2].mlp.dense_h_to_4h.weight)

    status, printed, _ = script(eval_kl, out, "--tokens", 256, "--json", tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    assert status == 0 and table["tokens"] == 256 and (table["start"], table["end"]) == (1, 4)
    names = [row["name"] for row in table["rows"]]
    assert names[:3] == ["teacher", "LFT euler x1", "LFT euler x2"] and "skip 2, best anywhere" in names
    assert all(name in printed for name in names)
    keys = {"name", "layers_replaced", "evaluations", "kl", "kl_stderr", "nmse", "perplexity", "top1_agreement"}
    assert all(keys <= row.keys() for row in table["rows"])

    # The KL that training printed at the end is that of the student on the same held-out text.
    held_out = lft.held_out_tokens(str(text), tokenizer, 32)
    student = lft.replace_span(teacher, 1, 4, lft.FlowLayer(velocity, 1, 4, solver, steps))
    p = teacher(held_out, use_cache=False).logits.double().log_softmax(-1)
    q = student(held_out, use_cache=False).logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert printed_kl(trained, "student") == pytest.approx(kl, abs=6e-5)


def test_training_brings_the_student_nearer(script, tmp_path):
    """A short run on the embedded teacher leaves less than half of the KL of the dropped span."""
    out = tmp_path / "run"
    options = ["--teacher", "tiny_teacher", "--start", 4, "--end", 8, "--batch-size", 4, "--seq-len", 64]
    status, printed, _ = script(train_fw, *options, "--out", out, "--max-steps", 60)
    assert status == 0 and printed_kl(printed, "student") < 0.5 * printed_kl(printed, "span dropped")


def test_the_training_loop_takes_the_steps_written_out_by_hand(script, tmp_path, teacher_folder, text):
    script(train_fm, "--out", tmp_path / "run", "--max-steps", 4, "--lr", 0.1, "--batch-size", 3)
    trained = load_file(tmp_path / "run" / "flow.safetensors")

    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    torch.manual_seed(0)
    velocity = lft.VelocityBlock(teacher.config, teacher.gpt_neox.layers[1])
    weights = list(velocity.parameters())
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    muon = [name.startswith("layer.") and w.ndim == 2 for name, w in velocity.named_parameters()]
    assert sum(muon) == 4  # the matrices of the attention and of the MLP
    batches = lft.token_batches(str(text), tokenizer, 3, 32, seed=0)
    for n in range(1, 5):
        with train_fm.autocast(torch.device("cpu")):
            x0, x1, context = lft.hidden_pair(teacher, next(batches), 1, 4)
            loss = train_fm.flow_matching_loss(lambda x, t: velocity(x, t, **context), x0, x1, time_power=3)
        gradients = torch.autograd.grad(loss, weights)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        lr = 0.1 * n / 50 * (1 - (n - 1) / 4)
        with torch.no_grad():
            for w, g, m, v, by_muon in zip(weights, gradients, first, second, muon):  # decay 0.01, clipped at norm 1
                g = g / max(norm, 1)
                w.mul_(1 - 0.01 * lr)
                if by_muon:  # momentum 0.95, Nesterov's, made nearly orthogonal by five Newton-Schulz steps
                    m.mul_(0.95).add_(0.05 * g)
                    x = 0.05 * g + 0.95 * m
                    tall, x = len(x) > len(x.T), x.bfloat16() / x.bfloat16().norm()
                    x = x.T if tall else x
                    for _ in range(5):
                        square = x @ x.T
                        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
                    w.sub_(lr * 0.2 * max(w.shape) ** 0.5 * (x.T if tall else x))
                else:  # AdamW (0.9, 0.95)
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.95).add_(0.05 * g * g)
                    w.sub_(lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.95**n)).sqrt() + 1e-8))
    # Where the true gradient is 0, as of a bias of the keys, AdamW follows rounding: so the whole is compared, not each weight.
    start = teacher.gpt_neox.layers[1].state_dict()
    by_hand = {name.removeprefix("layer."): weight for name, weight in velocity.state_dict().items()}
    moved = sum((by_hand[name] - weight).square().sum() for name, weight in start.items())
    apart = sum((by_hand[name] - trained["layer." + name]).square().sum() for name in start)
    # And Newton-Schulz steps in bfloat16 magnify the rounding of the smallest singular values.
    assert moved > 0.01 and apart < 0.03 * moved


@pytest.mark.parametrize("init, layer", [("middle", 2), ("first", 1), ("5", 5), ("random", None)])
def test_init_names_the_layer_to_start_from(small, init, layer):
    args = train_fm.parse_arguments("", "fm", 1, 4).parse_args(["--init", init])
    expected = None if layer is None else small.gpt_neox.layers[layer]
    assert train_fm.init_layer(small, args) is expected


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(script, tmp_path, teacher_folder):
    out = tmp_path / "run"
    status, _, _ = script(train_fw, "--out", out, "--lr", 1e30, "--max-steps", 50)
    assert "step" in status and "try a lower --lr" in status and f"{out} holds the flow of step 0" in status
    info = json.loads((out / "flow.json").read_text())
    assert info["trained_steps"] == 0
    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    velocity, _ = lft.load_flow(out, teacher)
    first = teacher.gpt_neox.layers[1].state_dict()  # where it started
    assert all(torch.equal(weight, first[name]) for name, weight in velocity.layer.state_dict().items())


def test_a_failed_run_keeps_its_last_good_step_and_never_overwrites_with_nothing(script, tmp_path, monkeypatch):
    out, losses = tmp_path / "run", itertools.chain([1, 1, 1, math.nan], itertools.repeat(1))
    flow_matching_loss = train_fm.flow_matching_loss
    monkeypatch.setattr(train_fm, "flow_matching_loss", lambda *args, **more: flow_matching_loss(*args, **more) * next(losses))
    status, _, _ = script(train_fm, "--out", out, "--max-steps", 9)
    assert "the loss of step 4 is nan" in status and f"{out} holds the flow of step 2" in status
    assert json.loads((out / "flow.json").read_text())["trained_steps"] == 2
    before = listing(out)
    for first, last in [([1], "the loss of step 2 is nan"), ([], "the loss of step 1 is nan")]:
        losses = itertools.chain(first, [math.nan], itertools.repeat(1))
        status, _, _ = script(train_fm, "--out", out, "--overwrite")
        assert last in status and "nothing was saved" in status and listing(out) == before
    losses = itertools.repeat(1)
    assert script(train_fm, "--out", out, "--overwrite")[0] == 0
    assert json.loads((out / "flow.json").read_text())["trained_steps"] == 3


def test_held_out_scores_and_the_flow_come_every_so_often(script, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(train_fm, "save_flow", lambda folder, velocity, info: saved.append(info["trained_steps"]))
    status, printed, _ = script(train_fm, "--out", tmp_path / "run", "--max-steps", 5, "--save-every", 2)
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 5"]
    assert all("held-out NMSE 0." in line and "KL " in line for line in lines) and saved == [2, 4, 5]


def test_ctrl_c_saves_and_says_where(tmp_path, teacher_folder, text):
    out = tmp_path / "run"
    options = ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--out", out, "--max-steps", 10**6]
    options += ["--device", "cpu"]
    command = [sys.executable, HERE / "train_fm.py", *map(str, options)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while "replaces layers" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and f"interrupted; {out} holds the flow of step" in errors and "Traceback" not in errors
    info = json.loads((out / "flow.json").read_text())
    assert info["trained_steps"] > 0 and f"of step {info['trained_steps']}" in errors
    lft.load_flow(out, lft.load_teacher(str(teacher_folder))[0])


def listing(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--start", 4, "--end", 4], "6 layers"),
        (["--start", 4, "--end", 2], "6 layers"),
        (["--start", -1, "--end", 2], "6 layers"),
        (["--start", 2, "--end", 7], "6 layers"),
        (["--teacher", "bert"], "is a bert model: give a GPT-NeoX"),
        (["--teacher", "/no/such/folder"], "neither a folder"),
        (["--teacher", "empty"], "neither a folder"),
        (["--teacher", "headless"], "lacks 12 of its weights"),
        (["--data", "no/such/*.txt"], "no file is named by"),
        (["--data", "empty"], "no text at empty"),
        (["--alpha", "-0.1"], "give 0 or more"),
        (["--logit-weight", "nan"], "--logit-weight nan is no weight: give 0 or more"),
        (["--time-power", "0"], "--time-power 0.0 is no power: give more than 0"),
        (["--time-power", "inf"], "--time-power inf is no power"),
        (["--lr", "0"], "--lr 0.0 is too small"),
        (["--teacher", "speechless"], "has no tokenizer that fits it"),
        (["--data", "short.txt"], "less than one"),
        (["--data", "/no/such/file.txt"], "neither a file"),
        (["--seq-len", 65], "give 2 to 64"),
        (["--seq-len", 0], "--seq-len 0 is too small"),
        (["--max-steps", 0], "--max-steps 0 is too small"),
        (["--batch-size", -1], "--batch-size -1 is too small"),
        (["--steps", 0], "--steps 0 is too small"),
        (["--init", "last"], "give middle, first, random or 0..5"),
        (["--out", "taken"], "holds a run already"),
        (["--out", "short.txt"], "cannot be made a folder"),
        pytest.param(
            ["--device", "cuda"], "use --device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
        ),
    ],
)
def test_bad_input_to_training_ends_in_one_sentence(script, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    BertConfig().save_pretrained("bert")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "flow.json").write_text("{}")
    (tmp_path / "short.txt").write_text("too short")
    teacher = random_teacher()
    teacher.save_pretrained("speechless")
    del teacher.gpt_neox.layers[3]
    teacher.save_pretrained("headless")
    before = listing(tmp_path)
    status, printed, errors = script(train_fm if "--time-power" in options else train_fw, *options)
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert printed == "" and listing(tmp_path) == before


def test_a_run_that_is_missing_damaged_or_anothers_is_refused(script, tmp_path, teacher_folder):
    out = tmp_path / "run"
    assert script(train_fm, "--out", out, "--max-steps", 1)[0] == 0
    whole = {path: path.read_bytes() for path in out.iterdir()}
    other = tmp_path / "other"
    teacher = lft.load_teacher(str(teacher_folder))[0]
    teacher.gpt_neox.layers[5].mlp.dense_h_to_4h.bias[3] += 1e-3  # one weight of a layer that the flow never sees
    teacher.save_pretrained(other)
    lft.load_teacher("tiny_teacher")[1].save_pretrained(other)

    def changed(**values):
        (out / "flow.json").write_text(json.dumps(json.loads(whole[out / "flow.json"]) | values))

    def shorten(name):
        (out / name).write_bytes(whole[out / name][: len(whole[out / name]) // 2])

    for damage, message in [
        (lambda: (out / "flow.json").unlink(), "no run at"),
        (lambda: (out / "flow.safetensors").unlink(), "flow.safetensors of run"),
        (lambda: shorten("flow.json"), "damaged or cut short"),
        (lambda: shorten("flow.safetensors"), "damaged or cut short"),
        (lambda: (out / "flow.json").write_text("[]"), "damaged or cut short"),
        (lambda: changed(format=99), "has format 99"),
        (lambda: changed(teacher=str(other)), "its fingerprint is"),
        (lambda: changed(teacher="tiny_teacher"), "its layers is 6 and this one's 24"),
        (lambda: changed(end=7), "6 layers"),
        (lambda: changed(start=0), "are of different runs"),
    ]:
        for path, content in whole.items():
            path.write_bytes(content)
        damage()
        before = listing(out)
        status, printed, errors = script(eval_kl, out, "--json", tmp_path / "table.json")
        assert status == 2 and printed == "" and message in errors and errors.count("\n") == 1, message
        assert listing(out) == before and not (tmp_path / "table.json").exists()
    status, _, errors = script(eval_kl, tmp_path / "nowhere")
    assert status == 2 and "no run at" in errors


# Choosing a span, and putting runs together


def test_the_recoupling_ratio_is_that_of_the_best_of_all_pairings():
    found = set()
    for seed in range(20):
        x0, noise = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed))
        x1 = x0 + 1.5 * noise
        cost = (x0[:, None] - x1).square().sum(-1)
        best = min(itertools.permutations(range(6)), key=lambda pairing: cost[range(6), pairing].sum().item())
        ratio = choose_span.recoupling_ratio(x0, x1)
        assert ratio == pytest.approx(sum(i != j for i, j in enumerate(best)) / 6)
        found.add(ratio)
    assert len(found) > 3
    assert choose_span.recoupling_ratio(x0, x0 + 100) == 0  # what moves all alike moves no pair
    assert choose_span.recoupling_ratio(x0, x0[[1, 0, 2, 3, 5, 4]]) == pytest.approx(4 / 6)


def test_every_span_is_measured_between_the_states_of_the_library(small, ids):
    states = list(small(ids, output_hidden_states=True).hidden_states[:-1])  # its last is after the final norm
    states.append(small.gpt_neox.layers[-1](states[-1], **lft.embed(small, ids)[1]))
    ratio, moved = choose_span.ratios(small, ids)
    for start, end in itertools.product(range(6), range(7)):
        if start >= end:
            assert ratio[start, end].isnan() and moved[start, end].isnan()
            continue
        pairs = list(zip(states[start], states[end]))
        expected = sum(choose_span.recoupling_ratio(x0, x1) for x0, x1 in pairs) / 3
        assert ratio[start, end].item() == pytest.approx(expected, abs=1e-6)
        expected = sum(((x1 - x0).norm() ** 2 / x1.norm() ** 2).item() for x0, x1 in pairs) / 3
        assert moved[start, end].item() == pytest.approx(expected, rel=1e-4)
    assert ratio[0, 6] > ratio[0, 1]


def test_choose_span_names_the_best_span_and_compares_runs(script, tmp_path, monkeypatch, teacher_folder, text):
    measured = torch.full((2, 6, 7), torch.nan)  # R, and how far the state is moved: of six layers, spans of two
    measured[:, range(5), range(2, 7)] = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.4], [0.1, 0.3, 0.2, 0.4, 0.5]])
    monkeypatch.setattr(choose_span, "ratios", lambda teacher, sequences, title: measured)
    runs = [tmp_path / name for name in "abc"]
    for run, start, kl in zip(runs, (0, 2, 4), (0.1, 0.3, 0.2)):
        assert script(train_fm, "--out", run, "--start", start, "--end", start + 2, "--max-steps", 1)[0] == 0
        with open(run / "log.jsonl", "a") as log:
            print(json.dumps({"tokens": 1, "held_out_kl": kl}), file=log)
    options = ["--length", 2, "--teacher", teacher_folder, "--data", text, "--batch", 32, "--tokens", 128]
    status, printed, _ = script(choose_span, *options, "--picture", tmp_path / "map.png", "--compare", *runs)
    assert status == 0 and (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    spans = [line.split()[1] for line in printed.splitlines() if line.startswith("  layers") and ".." in line]
    assert spans == ["2..3", "1..2", "3..4", "4..5", "0..1"]
    assert "3 spans share the lowest R" in printed and "--start 2 --end 4" in printed
    # The KL ranks the runs 1, 3, 2; R 3, 1, 2 and how far they move 1, 2, 3. By hand: 1 - 6 (4 + 4 + 0) / (3 · 8), and with 0 + 1 + 1.
    assert "over 3 runs: of R -1.00, of how far the span moves the state 0.50" in printed

    info = json.loads((runs[0] / "flow.json").read_text())
    other, unscored = tmp_path / "other", tmp_path / "unscored"
    for run, said in ((other, {"teacher_is": info["teacher_is"] | {"fingerprint": "f"}}), (unscored, {})):
        run.mkdir()
        (run / "flow.json").write_text(json.dumps(info | said))
    (unscored / "log.jsonl").write_text('{"tokens": 1}\n')
    for option, message in [
        (["--compare", other], "is of another teacher"),
        (["--compare", unscored], "holds no held-out KL (no line has one)"),
        (["--length", 7], "6 layers"),
        (["--length", 0], "--length"),
        (["--batch", 65], "--batch"),
        (["--compare", tmp_path], "no run at"),
        (["--picture", tmp_path / "nowhere" / "map.png"], "could not be written"),
    ]:
        status, _, errors = script(choose_span, *options, *option)
        assert status == 2 and message in errors and errors.count("\n") == 1, message


def test_results_are_means_and_deviations_over_seeds(script, tmp_path):
    options = {"a": [train_fm, "--seed", 0], "b": [train_fm, "--seed", 1], "c": [train_fw, "--solver", "euler", "--steps", 1]}
    kl = {}
    for name, (module, *more) in options.items():
        assert script(module, "--out", tmp_path / name, "--max-steps", 2, "--save-every", 1, *more)[0] == 0
        brief = ["--no-baselines"] if name == "a" else []
        assert script(eval_kl, tmp_path / name, "--tokens", 256, *brief, "--json", tmp_path / name / "table.json")[0] == 0
        kl[name] = {row["name"]: row["kl"] for row in json.loads((tmp_path / name / "table.json").read_text())["rows"]}
    status, printed, _ = script(results, *(tmp_path / name for name in kl), "--pictures", tmp_path / "pictures")
    assert status == 0
    for name in ("ladder.png", "evaluations.png", "tokens.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    cells = [row.removesuffix(" |").split(" | ") for row in printed.splitlines()[2:]]
    rows = {tuple(row[:2]): row[2:] for row in cells}
    tokens = json.loads((tmp_path / "a" / "flow.json").read_text())["trained_tokens"]
    trained = f"{tokens / 1e6:g} M tokens"
    for row, shown in (("LFT euler x1", "euler ×1"), ("LFT midpoint x3", "midpoint ×3")):
        both = [kl["a"][row], kl["b"][row]]
        evaluations = "1" if "euler" in row else "6"
        assert rows["| 1..3", f"flow matching, t = τ^3, {trained}; {shown}"] == [evaluations, f"{sum(both) / 2:.4f} ± {abs(both[0] - both[1]) / math.sqrt(2):.4f}", "2"]
    assert rows["| 1..3", f"regression, {trained}; euler ×1"] == ["1", f"{kl['c']['LFT euler x1']:.4f}", "1"]
    assert not any("regression" in by and "×3" in by for _, by in rows)  # which it was not trained for
    assert rows["| 1..3", "span dropped"][1] == f"{kl['a']['span dropped']:.4f}"
    baselines = {"linear map", "skip 2, best inside span", "skip 4, best anywhere"}
    assert baselines <= kl["b"].keys() and kl["b"].keys() - kl["a"].keys() >= baselines
    assert all(name.startswith(("teacher", "LFT", "span")) for name in kl["a"])
    for name in baselines:  # of one table that has them
        assert [values for (_, by), values in rows.items() if by == name][0][1] == f"{kl['c'][name]:.4f}"

    names = {"fm": {}, "fm3": {"time_power": 3.0}, "fw": {"steps": 3}, "kl": {"steps": 1, "solver": "euler", "alpha": 0.1, "logit_weight": 1.0}}
    given = {name: results.loss_of({"method": name[:2], "solver": "midpoint", **info}) for name, info in names.items()}
    assert given["fm"] == "flow matching" and given["fw"] == "Flow Walking, midpoint ×3"
    assert given["fm3"] == "flow matching, t = τ^3" and given["kl"] == "regression + 0.1 flow matching + logits' KL"

    longer = json.loads((tmp_path / "b" / "flow.json").read_text()) | {"trained_tokens": 12_345_678}
    (tmp_path / "b" / "flow.json").write_text(json.dumps(longer))  # so not to be averaged with a
    status, printed, _ = script(results, tmp_path / "a", tmp_path / "b", "--pictures", tmp_path / "pictures")
    for name, trained in (("a", f"{tokens / 1e6:g}"), ("b", "12.35")):
        assert f"| flow matching, t = τ^3, {trained} M tokens; euler ×1 | 1 | {kl[name]['LFT euler x1']:.4f} | 1 |" in printed

    (tmp_path / "c" / "table.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "b" / "table.json").unlink()
    for name, message in (("c", "lacks LFT euler x1"), ("b", "eval_kl.py")):
        status, printed, errors = script(results, tmp_path / "a", tmp_path / name, "--pictures", tmp_path / "none")
        assert status == 2 and printed == "" and message in errors and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name, package", [("choose_span", "scipy"), ("results", "matplotlib")])
def test_a_missing_extra_package_is_named(name, package):
    code = f"import sys; sys.modules['{package}'] = None; import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install" in done.stderr and package in done.stderr


# Runs that stop and go on, and runs of several processes


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A small data set of compressed JSON lines, laid out like monology/pile-uncopyrighted."""
    folder = tmp_path_factory.mktemp("shards")
    words = (HERE / "lft.py").read_text().split()
    texts = [" ".join(words[i : i + 40]) for i in range(0, 1200, 40)]  # 30 documents
    write_shard(folder / "train" / "00.jsonl.zst", texts[:11])
    write_shard(folder / "train" / "01.jsonl.zst", texts[11:25])
    write_shard(folder / "val.jsonl.zst", texts[25:])
    return folder


def equal_runs(one, two):
    """Whether two runs hold the same weights, optimizer, place in the text and random state, bit for bit."""
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, two))
    one["args"]["out"] = two["args"]["out"]
    one["args"]["resume"] = two["args"]["resume"]

    def equal(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(equal, a, b))
        return torch.equal(a, b) if torch.is_tensor(a) else a == b

    return equal(one, two)


def logged(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [[], ["--accumulate", 2]])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("module", [train_fm, train_fw])
def test_a_resumed_run_is_the_run_that_never_stopped(script, tmp_path, monkeypatch, module, streamed, options, shards, text):
    """Bit for bit, over the end of a pass: the streamed text has 41 sequences, and eight steps of 8 take 64."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    save_flow = lft.save_flow

    def save_and_copy(folder, velocity, info):
        save_flow(folder, velocity, info)
        if info["trained_steps"] == 4:
            shutil.copytree(folder, half)

    monkeypatch.setattr(train_fm, "save_flow", save_and_copy)
    options = ["--batch-size", 8, "--max-steps", 8, "--save-every", 4, "--data", shards if streamed else text, *options]
    assert script(module, "--out", whole, *options)[0] == 0
    monkeypatch.undo()
    assert torch.load(half / "checkpoint.pt", weights_only=True)["step"] == 4
    with open(half / "log.jsonl", "a") as log:  # as of a run that was killed while it wrote what comes after the checkpoint
        log.write('{"step": 5, "tokens": 0}\n{"step": 6, "tok')
    assert script(module, "--resume", half)[0] == 0
    assert equal_runs(whole, half)
    assert (whole / "flow.safetensors").read_bytes() == (half / "flow.safetensors").read_bytes()
    assert json.loads((whole / "flow.json").read_text()) == json.loads((half / "flow.json").read_text())
    one, two = ([{**line, "tokens_per_second": 0, "peak_memory_gib": 0} for line in logged(run)] for run in (whole, half))
    assert [line["step"] for line in one] == [4, 8] and one == two


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(script, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    script(train_fw, "--out", tmp_path / "whole", "--max-steps", 6)
    steps = iter(range(6))
    loss_of = train_fw.flow_walking_loss

    def interrupting(*args, **more):
        if next(steps) == 2:
            signal.raise_signal(signal.SIGINT)  # in the middle of step 3, which is finished
        return loss_of(*args, **more)

    monkeypatch.setattr(train_fw, "flow_walking_loss", interrupting)
    status, _, _ = script(train_fw, "--out", tmp_path / "part", "--max-steps", 6)
    assert status == f"interrupted; {tmp_path / 'part'} holds the flow of step 3"
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert script(train_fw, "--resume", tmp_path / "part")[0] == 0
    assert equal_runs(tmp_path / "whole", tmp_path / "part")


def in_process(module, options, environment=None, interrupted=False):
    """What a process of its own does: a script's main; if told so, with a Ctrl-C during the first step."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    loss_of = train_fm.flow_matching_loss

    def interrupting(*args, **more):
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)
        return loss_of(*args, **more)

    if interrupted:
        train_fm.flow_matching_loss = interrupting
    sys.argv = [module, *map(str, options)]
    lft.run_script({"train_fm": train_fm, "train_fw": train_fw}[module].main)


@pytest.fixture(scope="session")
def processes():
    """A way to start processes that have loaded the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_lft"])
    return context


KILLS = int(os.environ.get("KILLS", 6))


def test_a_run_killed_at_any_moment_goes_on_from_its_last_checkpoint(processes, tmp_path, teacher_folder, text):
    """kill -9 at random moments, in the middle of a save too; what comes out in the end is the run that nobody killed."""
    options = ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--device", "cpu", "--batch-size", 1]
    options += ["--max-steps", 20 + 5 * KILLS, "--save-every", 1]
    run, chance, (teacher, _) = tmp_path / "killed", random.Random(0), lft.load_teacher(str(teacher_folder))
    checkpoint = run / "checkpoint.pt"

    def start():
        resumed = ["--resume", run, "--device", "cpu"] if checkpoint.exists() else [*options, "--out", run]
        process = processes.Process(target=in_process, args=("train_fm", resumed))
        process.start()
        return process

    for kill in range(KILLS):
        process, before = start(), checkpoint.read_bytes() if checkpoint.exists() else None
        while process.is_alive() and kill % 3 and (not checkpoint.exists() or checkpoint.read_bytes() == before):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1 if kill % 3 else 1.0))  # two of three while it trains, one at any time
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if checkpoint.exists():
            torch.load(checkpoint, weights_only=True)
        if (run / "flow.json").exists():
            lft.load_flow(run, teacher)
    process = start()
    process.join()
    assert process.exitcode == 0
    whole = processes.Process(target=in_process, args=("train_fm", [*options, "--out", tmp_path / "whole"]))
    whole.start()
    whole.join()
    assert equal_runs(tmp_path / "whole", run)
    assert [line["step"] for line in logged(run)] == list(range(1, 21 + 5 * KILLS))


def test_a_full_disk_is_said_and_leaves_the_earlier_run(script, tmp_path):
    out = tmp_path / "run"
    assert script(train_fm, "--out", out)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "log.jsonl"}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # every write beyond fails, as on a full disk
        status, _, errors = script(train_fm, "--out", out, "--overwrite", "--seed", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 2 and "could not be written, and is as it was: make room" in errors and errors.count("error:") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "log.jsonl"} == before


def test_what_cannot_be_resumed_is_refused(script, tmp_path, monkeypatch, teacher_folder):
    run = tmp_path / "run"
    script(train_fm, "--out", run, "--max-steps", 2, "--save-every", 1)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)

    def refused(module, message, *options, **changed):
        if changed:
            torch.save(saved | {"step": 1} | changed, run / "checkpoint.pt")
        before = listing(tmp_path)
        status, _, errors = script(module, "--resume", run, *options)
        assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
        assert listing(tmp_path) == before

    refused(train_fm, "trained to its last step, 2")
    refused(train_fw, "is a run of train_fm.py", step=1)
    refused(train_fm, "leave out --lr", "--lr", 1.0)
    refused(train_fm, "needs the teacher", teacher_is={})
    refused(train_fm, "and 2 processes", processes=saved["processes"] * 2)
    refused(train_fm, "no checkpoint of this version", format=0)
    torch.save({"weights": 1}, run / "checkpoint.pt")
    refused(train_fm, "no checkpoint of this version")
    torch.save(saved, run / "checkpoint.pt")
    (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:3000])
    refused(train_fm, "is damaged, or no checkpoint")
    torch.save(print, run / "checkpoint.pt")  # a pickled function: it is not loaded
    refused(train_fm, "is damaged, or no checkpoint")
    (run / "checkpoint.pt").unlink()
    refused(train_fm, "no checkpoint at")


def test_a_resumed_run_keeps_its_device_and_compiling_unless_told_otherwise(script, tmp_path, monkeypatch):
    run = tmp_path / "run"
    script(train_fm, "--out", run, "--max-steps", 1)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["args"]["device"] == "cpu"
    for compiled, options, expected in [(True, [], ("cpu", True)), (False, ["--compile", "--device", "cuda"], ("cuda", True))]:
        torch.save(saved | {"step": 0, "args": saved["args"] | {"compile": compiled}}, run / "checkpoint.pt")
        monkeypatch.setattr(sys, "argv", ["train_fm.py", "--resume", str(run), *options])
        args, _ = train_fm.read_arguments(train_fm.parse_arguments("", "fm", 1, 4), "fm")
        assert (args.device, args.compile) == expected


def test_a_run_that_is_overwritten_keeps_its_log_until_its_checkpoint_is_replaced(script, tmp_path, monkeypatch):
    out = tmp_path / "run"
    script(train_fm, "--out", out, "--max-steps", 2)
    before = listing(out)
    monkeypatch.setattr(train_fm, "LOG_EVERY", 1)
    flow_matching_loss, seen = train_fm.flow_matching_loss, []

    def watched(*args, **more):
        seen.append(listing(out) == before)
        return flow_matching_loss(*args, **more)

    monkeypatch.setattr(train_fm, "flow_matching_loss", watched)
    script(train_fm, "--out", out, "--max-steps", 5, "--save-every", 3, "--overwrite")
    assert seen == [True] * 3 + [False] * 2 and [line["step"] for line in logged(out)] == [1, 2, 3, 4, 5]
    losses = itertools.chain([1] * 4, itertools.repeat(math.nan))
    monkeypatch.setattr(train_fm, "flow_matching_loss", lambda *args, **more: flow_matching_loss(*args, **more) * next(losses))
    status, _, _ = script(train_fm, "--out", out, "--max-steps", 9, "--overwrite")
    assert "holds the flow of step 3" in status and not (out / "checkpoint.pt").exists()  # which would be of the other run


def test_a_resumed_run_that_diverges_keeps_its_checkpoint(script, tmp_path, monkeypatch):
    out, flow_matching_loss = tmp_path / "run", train_fm.flow_matching_loss
    script(train_fm, "--out", out, "--max-steps", 30, "--save-every", 10)
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"step": 10}, out / "checkpoint.pt")
    before = (out / "checkpoint.pt").read_bytes()
    losses = itertools.chain([1] * 3, itertools.repeat(math.nan))
    monkeypatch.setattr(train_fm, "flow_matching_loss", lambda *args, **more: flow_matching_loss(*args, **more) * next(losses))
    status, _, _ = script(train_fm, "--resume", out)
    assert "holds the flow of step 12" in status and (out / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("streamed", [False, True])
def test_batches_go_on_from_a_saved_state(tmp_path, shards, text, tiny, streamed):
    data, (_, tokenizer) = str(shards if streamed else text), tiny
    state = {}
    batches = lft.token_batches(data, tokenizer, 3, 32, 0, state)
    taken, states = [], []
    for _ in range(200):  # many passes
        taken.append(next(batches))
        states.append(copy.deepcopy(state))
    for after in (0, 1, 7, 50, 100):
        again = lft.token_batches(data, tokenizer, 3, 32, 0, copy.deepcopy(states[after]))
        assert all(torch.equal(next(again), batch) for batch in taken[after + 1 : after + 60])


def test_processes_share_local_text_out_as_one_process_takes_it(text, tiny):
    _, tokenizer = tiny
    one = lft.token_batches(str(text), tokenizer, 4, 32, 0)
    two = [lft.token_batches(str(text), tokenizer, 2, 32, 0, rank=rank, processes=2) for rank in (0, 1)]
    for _ in range(100):
        assert torch.equal(next(one), torch.cat([next(batches) for batches in two]))


def test_processes_read_rows_of_their_own(shards):
    rows = [list(lft.hub_documents(str(shards), "train", rank=rank, processes=2)) for rank in (0, 1)]
    assert sorted(rows[0] + rows[1]) == sorted(lft.hub_documents(str(shards), "train")) and len(rows[0]) > 5 < len(rows[1])
    # More processes than rows: one of them would wait for text for ever.
    with pytest.raises(lft.InputError, match="fewer rows than there are processes"):
        next(lft.token_batches(str(shards), Letters(), 2, 4, 0, rank=99, processes=100))


def run_two(processes, module, *options, interrupted=False):
    """Run a script in two processes, as torchrun starts them, with a Ctrl-C for both or without."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        started.append(processes.Process(target=in_process, args=(module, options, environment, interrupted)))
        started[-1].start()
    for process in started:
        process.join(60)
        process.kill()  # one that hangs has no exit code yet, and fails
    assert [process.exitcode for process in started] == [int(interrupted), 0]


def test_parts_and_processes_train_as_one_batch_does(script, processes, tmp_path, teacher_folder, text):
    """With one Euler step Flow Walking draws no times, so two processes, or two parts, make the very step that one makes."""
    options = ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--device", "cpu", "--steps", 1]
    options += ["--solver", "euler", "--batch-size", 8, "--max-steps", 4, "--lr", 0.001]
    script(train_fw, *options, "--out", tmp_path / "one")
    script(train_fw, *options, "--out", tmp_path / "parts", "--accumulate", 4)
    run_two(processes, "train_fw", *options, "--out", tmp_path / "two")
    run_two(processes, "train_fw", *options, "--out", tmp_path / "both", "--accumulate", 2)
    expected, weights = logged(tmp_path / "one")[-1], load_file(tmp_path / "one" / "flow.safetensors")
    start = lft.load_teacher(str(teacher_folder))[0].gpt_neox.layers[2].state_dict()
    moved = sum((weights["layer." + name] - weight).square().sum() for name, weight in start.items())
    for run in ("parts", "two", "both"):
        line = logged(tmp_path / run)[-1]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-2)  # in bfloat16
        other = load_file(tmp_path / run / "flow.safetensors")
        apart = sum((weights["layer." + name] - other["layer." + name]).square().sum() for name in start)
        assert 0 < moved and apart < 0.01 * moved
    info = json.loads((tmp_path / "two" / "flow.json").read_text())
    assert info["trained_tokens"] == 4 * 8 * 32


def test_the_gradient_of_two_processes_is_that_of_the_joint_batch(processes, tmp_path, teacher_folder, text):
    """Flow matching in two processes, each with times of its own, against autograd on the joint batch."""
    options = ["--teacher", teacher_folder, "--data", text, "--start", 1, "--end", 4, "--device", "cpu", "--batch-size", 8]
    run_two(processes, "train_fm", *options, "--max-steps", 1, "--out", tmp_path / "two")
    teacher, tokenizer = lft.load_teacher(str(teacher_folder))
    torch.manual_seed(0)
    velocity = lft.VelocityBlock(teacher.config, teacher.gpt_neox.layers[1])
    times = [torch.rand(4, 1, 1)]
    torch.manual_seed(1)
    times = torch.cat([*times, torch.rand(4, 1, 1)]) ** 3
    with train_fm.autocast(torch.device("cpu")):
        x0, x1, context = lft.hidden_pair(teacher, next(lft.token_batches(str(text), tokenizer, 8, 32, 0)), 1, 4)
        loss = (velocity((1 - times) * x0 + times * x1, times, **context) - (x1 - x0)).square().mean()
    loss.backward()
    line = logged(tmp_path / "two")[-1]
    norm = sum(weight.grad.square().sum() for weight in velocity.parameters()).sqrt()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_two_processes_resume_exactly(processes, tmp_path, teacher_folder, shards):
    options = ["--teacher", teacher_folder, "--data", shards, "--start", 1, "--end", 4, "--device", "cpu", "--batch-size", 4]
    options += ["--max-steps", 4, "--save-every", 2]
    run_two(processes, "train_fm", *options, "--out", tmp_path / "whole")
    run_two(processes, "train_fm", *options, "--out", tmp_path / "half", interrupted=True)
    assert torch.load(tmp_path / "half" / "checkpoint.pt", weights_only=True)["step"] == 2
    run_two(processes, "train_fm", "--resume", tmp_path / "half", "--device", "cpu")
    assert equal_runs(tmp_path / "whole", tmp_path / "half")


def test_the_log_says_what_training_did(script, tmp_path):
    out = tmp_path / "run"
    script(train_fm, "--out", out, "--max-steps", 25, "--save-every", 20, "--batch-size", 8)
    lines = logged(out)
    assert [line["step"] for line in lines] == [10, 20, 25] and [line["tokens"] for line in lines] == [2560, 5120, 6400]
    assert all(len(line["loss_by_quarter_of_t"]) == 4 and line["tokens_per_second"] > 0 for line in lines)
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["lr"] > 0 for line in lines)
    assert ["held_out_kl" in line for line in lines] == [False, True, True]
    peaks = [line["peak_memory_gib"] for line in lines]
    assert sorted(peaks) == peaks and 0.05 < peaks[0] and peaks[-1] <= train_fm.peak_memory(torch.device("cpu")) + 0.005


def test_the_peak_memory_holds_what_was_allocated():
    before = train_fm.peak_memory(torch.device("cpu"))
    more = torch.ones(round((before + 0.5) * 2**28))  # half a GiB above all that there was, in float32
    assert before + 0.5 < train_fm.peak_memory(torch.device("cpu")) < 2 * before + 1.5
    del more


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_run_that_is_not(script, tmp_path):
    losses = []
    for options in ([], ["--compile"]):
        assert script(train_fw, "--out", tmp_path / f"run{len(losses)}", "--max-steps", 40, *options)[0] == 0
        losses.append([line["loss"] for line in logged(tmp_path / f"run{len(losses)}")])
    plain, compiled = losses
    assert plain[-1] < 0.9 * plain[0] and compiled == pytest.approx(plain, rel=0.01)


def test_losses_by_quarter_of_t():
    """With a velocity that is off by t itself the loss of a sequence is t squared: its mean over a quarter is known."""
    torch.manual_seed(0)
    x0, x1, by_quarter = torch.randn(4096, 2, 3), torch.randn(4096, 2, 3), torch.zeros(2, 4)
    loss = train_fm.flow_matching_loss(lambda x, t: x1 - x0 + t, x0, x1, by_quarter=by_quarter)
    expected = torch.tensor([((i + 1) ** 3 - i**3) / 48 for i in range(4)])  # the mean of t squared over each quarter
    torch.testing.assert_close(by_quarter[0] / by_quarter[1], expected, rtol=0.1, atol=0)
    assert by_quarter[1].sum() == 4096 and by_quarter[0].sum() / 4096 == pytest.approx(loss.item(), rel=1e-5)
    by_quarter.zero_()
    train_fm.flow_matching_loss(lambda x, t: x, x0, x1, time_power=1e-9, by_quarter=by_quarter)  # every t rounds to 1
    assert by_quarter[1].tolist() == [0, 0, 0, 4096]


def test_operations_are_counted(small):
    """A training step's matrix products by hand: layers [0, end) once, the velocity forwards and twice backwards."""
    args = argparse.Namespace(seq_len=16, start=1, end=4)
    h, channels = 32, lft.TIME_CHANNELS
    weights = 4 * h * h + 2 * 2 * h * h  # query, key, value, output; the MLP is twice as wide, both ways
    layer = 2 * weights + 2 * 2 * 16 * h  # and the scores and the mean of values over 16 tokens
    time_mlp = 2 * (channels * channels + channels * 6 * h) / 16  # once a sequence
    expected = 4 * layer + 3 * (layer + time_mlp) - 2 * channels * channels / 16  # the sinusoid needs no gradient
    teacher = copy.deepcopy(small)
    teacher.set_attn_implementation("eager")  # as on a GPU, where sdpa is counted too
    velocity = random_velocity(teacher).requires_grad_(True)
    objective = train_fm.Objective(velocity, train_fm.flow_matching_loss, torch.device("cpu"))
    assert train_fm.operations(teacher, objective, args) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("teacher, data", [("EleutherAI/pythia-410m", "stdlib"), ("tiny_teacher", "monology/pile-uncopyrighted")])
def test_a_hub_out_of_reach_names_the_way_out(tmp_path, teacher, data):
    """As a command, in a process of its own: the sentence alone, no traceback."""
    command = [sys.executable, HERE / "train_fw.py", "--max-steps", "1", "--teacher", teacher, "--data", data, "--device", "cpu"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    )
    way_out = "use --data stdlib" if teacher == "tiny_teacher" else "use --teacher tiny_teacher"
    assert result.returncode == 2 and way_out in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# The student as a model of transformers


SETTINGS = [(solver, steps, start, end) for solver in ("euler", "midpoint") for steps in (1, 2, 3) for start, end in ((0, 6), (1, 7), (2, 8))]


@pytest.fixture(scope="session")
def deep():
    """A teacher with room for six evaluations at its start, in its middle and at its end."""
    return random_teacher(num_hidden_layers=8)


def student_of(teacher, solver, steps, start, end):
    return lft.replace_span(teacher, start, end, lft.FlowLayer(random_velocity(teacher), start, end, solver, steps))


def left_padded(ids, lengths):
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy_without_cache(model, inputs, new_tokens):
    """Greedy decoding by whole forward passes, one row after another without its padding; ids and logits."""
    tokens, logits = [], []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        ids, row = ids[mask.bool()][None], []
        for _ in range(new_tokens):
            row.append(model(ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, row[-1].argmax(-1, keepdim=True)], 1)
        tokens.append(ids[0, -new_tokens:])
        logits.append(torch.cat(row))
    return torch.stack(tokens), torch.stack(logits)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("solver, steps, start, end", SETTINGS)
def test_generation_with_a_cache_equals_whole_forward_passes(deep, ids, solver, steps, start, end, attention, cache, padded):
    teacher = copy.deepcopy(deep)
    teacher.set_attn_implementation(attention)
    student = student_of(teacher, solver, steps, start, end)
    inputs = left_padded(ids, [20, 13, 7] if padded else [20, 20, 20])
    out = student.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation=cache if cache == "static" else None,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    tokens, logits = greedy_without_cache(student, inputs, 6)
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(out.sequences[:, 20:], tokens)


def test_beams_and_sampling_with_a_cache(deep, ids):
    student = student_of(deep, "midpoint", 3, 1, 7)
    inputs = left_padded(ids, [20, 13, 7])
    beams = [
        student.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*beams)
    samples = []
    for cache in (True, False):
        torch.manual_seed(0)
        samples.append(student.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=20, use_cache=cache, pad_token_id=0))
    assert torch.equal(*samples)


def test_a_teacher_generates_as_before(small, ids):
    before = small.generate(ids, max_new_tokens=5, do_sample=False)
    student_of(small, "euler", 2, 1, 4).generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(small.generate(ids, max_new_tokens=5, do_sample=False), before)


def test_set_flow_changes_the_integration(small, ids):
    student = student_of(small, "midpoint", 3, 1, 4)
    for solver, steps in (("euler", 2), ("euler", 1), ("midpoint", 1)):
        student.set_flow(solver, steps)
        assert torch.equal(student(ids).logits, student_of(small, solver, steps, 1, 4)(ids).logits)
    student.set_flow(steps=5)
    assert (student.flow.solver, student.flow.steps) == ("midpoint", 5)
    for solver, steps in (("heun", 1), ("euler", 0)):
        with pytest.raises(lft.InputError, match="euler or midpoint and at least 1 step"):
            student.set_flow(solver, steps)
    assert (student.flow.solver, student.flow.steps) == ("midpoint", 5)


@pytest.mark.parametrize("solver, steps", [("euler", 1), ("midpoint", 1)])
def test_a_student_drafts_for_its_teacher(small, ids, solver, steps):
    student = student_of(small, solver, steps, 1, 4)
    for row in ids.split(1):
        alone = small.generate(row, max_new_tokens=30, do_sample=False)
        assert torch.equal(small.generate(row, max_new_tokens=30, do_sample=False, assistant_model=student), alone)


def test_a_student_leaves_the_house(script, tmp_path, teacher_folder, ids):
    run, house = tmp_path / "run", tmp_path / "house"
    script(train_fw, "--out", run, "--steps", 1)
    student, tokenizer = lft.load_student(run)
    assert (student.flow.start, student.flow.end, student.flow.solver, student.flow.steps) == (1, 4, "midpoint", 1)
    teacher, _ = lft.load_teacher(str(teacher_folder))
    expected = student_of_run(run, teacher)(ids).logits
    assert torch.equal(student(ids).logits, expected)

    student.save_pretrained(house)
    tokenizer.save_pretrained(house)
    shutil.rmtree(run)
    copy_, tokens = lft.load_student(house)
    assert torch.equal(copy_(ids).logits, expected) and tokens("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert torch.equal(copy_.generate(ids, max_new_tokens=5), student.generate(ids, max_new_tokens=5))
    for load in (AutoModelForCausalLM.from_pretrained, GPTNeoXForCausalLM.from_pretrained):
        with pytest.raises((OSError, ValueError)):
            load(house)
    with pytest.raises(lft.InputError, match="load_student"):
        lft.Student.from_pretrained(house)
    whole = (house / "student.safetensors").read_bytes()
    (house / "student.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lft.InputError, match="damaged or cut short"):
        lft.load_student(house)


def student_of_run(run, teacher):
    velocity, info = lft.load_flow(run, teacher)
    flow = lft.FlowLayer(velocity, info["start"], info["end"], info["solver"], info["steps"])
    return lft.replace_span(teacher, info["start"], info["end"], flow)


def test_an_exported_student_is_smaller_by_the_layers_it_lost(tiny, tmp_path):
    teacher, _ = tiny
    velocity = random_velocity(teacher)
    for weight in velocity.parameters():
        weight += 1e-3 * torch.randn_like(weight)  # as after training: of more digits than float16 has
    student = lft.replace_span(teacher, 6, 18, lft.FlowLayer(velocity, 6, 18, "midpoint", 3))
    student.save_pretrained(tmp_path)
    removed = sum(weight.numel() for layer in teacher.gpt_neox.layers[6:18] for weight in layer.parameters())
    added = sum(weight.numel() for weight in velocity.parameters())
    expected = (HERE / "tiny_teacher" / "model.safetensors").stat().st_size - 2 * removed + 4 * added  # float16, and float32
    assert (tmp_path / "student.safetensors").stat().st_size == pytest.approx(expected, rel=0.01)


# A benchmark


def benchmark(batch=8, seq=256, start=1, end=5, rounds=12):
    """Print the tokens per second of training at Pythia-70M's shape, over those of the same matrix products alone.

    All take turns in one process; random weights, so nothing is learned.
    """
    config = GPTNeoXConfig(vocab_size=50304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8)
    hidden, heads = config.hidden_size, config.num_attention_heads
    cpu, ids = torch.device("cpu"), torch.randint(50304, (batch, seq))

    def training(loss_of, compiled):
        teacher = GPTNeoXForCausalLM._from_config(copy.deepcopy(config), attn_implementation="eager" if compiled else "sdpa")
        teacher.requires_grad_(False).eval()
        velocity = lft.VelocityBlock(teacher.config, teacher.gpt_neox.layers[3])
        optimizers = train_fm.optimizers_of(velocity, lr=1e-4)
        maybe = torch.compile if compiled else lambda function: function
        pair_of, objective = maybe(lft.hidden_pair), train_fm.Objective(maybe(velocity), loss_of, cpu)

        def step():
            with train_fm.autocast(cpu):
                loss = objective(*pair_of(teacher, ids, start, end))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(velocity.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            objective.zero_grad()

        return step

    def matrix_products(evaluations):
        """Those of `end` layers forward, of the velocity's evaluations forward and backward, and of Muon's update."""
        shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
        rows, matrices, scores = {}, {}, torch.randn(batch, heads, seq, seq).bfloat16()
        for pair in shapes:
            matrices[pair] = torch.randn(pair).bfloat16()
            rows |= {width: torch.randn(batch * seq, width).bfloat16() for width in pair}
        values = torch.randn(batch, heads, seq, hidden // heads).bfloat16()

        def forward():
            for (n, m), matrix in matrices.items():
                rows[n] @ matrix
            values @ values.mT, scores @ values

        def backward():
            for (n, m), matrix in matrices.items():
                rows[m] @ matrix.T, rows[n].T @ rows[m]
            values @ values.mT, scores.mT @ values, scores @ values, scores.mT @ values

        def update():
            for matrix in matrices.values():
                short = matrix if len(matrix) <= matrix.shape[1] else matrix.T  # (n, m), n <= m
                for _ in range(5):  # Newton-Schulz iterations
                    square = short @ short.T
                    square @ square, square @ short

        def step():
            for _ in range(end + evaluations):
                forward()
            for _ in range(evaluations):
                backward()
            update()

        return step

    for name, loss_of, evaluations in (("flow matching", train_fm.flow_matching_loss, 1), ("Flow Walking", train_fw.flow_walking_loss, 6)):
        steps = [matrix_products(evaluations), training(loss_of, compiled=False), training(loss_of, compiled=True)]
        times = []
        for _ in range(rounds):
            times.append([])
            for step in steps:
                begin = time.perf_counter()
                step()
                times[-1].append(time.perf_counter() - begin)
        floor, plain, compiled = zip(*times[2:])  # the first two warm up
        for how, training_times in (("", plain), (", --compile", compiled)):
            shares = sorted(f / t for f, t in zip(floor, training_times))
            median = shares[len(shares) // 2]
            print(f"{name}{how}: {batch * seq / sorted(training_times)[len(shares) // 2]:,.0f} tokens per second, "
                  f"{median:.2f} of the matrix products alone ({shares[0]:.2f} to {shares[-1]:.2f})")  # fmt: skip


if __name__ == "__main__":
    benchmark()
