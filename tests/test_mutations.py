"""Proof that the checks can fail: each mistake below, put into a copy of the package, fails the test that guards it."""

import multiprocessing
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent

# File, text (it stands there once), mistake, test that must fail (an expression of pytest's -k).
MUTATIONS = {
    "philox rounds": ("rng.py", "_ROUNDS = 10", "_ROUNDS = 9", "test_philox_known_answers"),
    "philox keys that do not advance": ("rng.py", "(k0 + _WEYL[0]) & _WORD", "k0", "test_philox_known_answers"),
    "philox of scalars only": (
        "rng.py",
        "    return c0, c1, c2, c3",
        "    return c0.flatten()[0], c1, c2, c3",
        "test_philox_broadcasts",
    ),
    "seed's high word dropped": ("rng.py", "(seed >> 32) & _WORD", "seed & 0", "test_counters_have_64_bits"),
    "position's high word dropped": (
        "rng.py",
        "(position >> 32) & _WORD",
        "position & 0",
        "test_seed_and_position_enter",
    ),
    "position without effect": (
        "rng.py",
        "(position & _WORD, (position >> 32) & _WORD",
        "(position & 0, (position >> 32) & 0",
        "test_every_seed_and_position",
    ),
    "one purpose": ("rng.py", "PURPOSE_TOKEN = 1", "PURPOSE_TOKEN = 0", "test_the_two_purposes"),
    "24-bit uniform": (
        "rng.py",
        "bits = (high << 21) | (low >> 11)",
        "bits = (high >> 8) << 29",
        "test_tail_tokens_are_reached and before",
    ),
    "32-bit uniform": (
        "rng.py",
        "bits = (high << 21) | (low >> 11)",
        "bits = high << 21",
        "test_tail_tokens and after",
    ),
    "uniform that can be 0": ("rng.py", ".clamp_min(2.0**-54)", "", "test_uniform_of_extreme_words"),
    "no log1p": ("rng.py", "-torch.log1p(-c)", "-torch.log(1 - c)", "test_gumbel_of_extreme_words"),
    "24-bit gumbel": (
        "rng.py",
        "c = high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64",
        "c = ((high >> 8).double() + 0.5) * 2.0**-24",
        "test_tail_tokens_are_reached and other",
    ),
    "gumbel for its negative": (
        "rng.py",
        "return -torch.log(exponential)",
        "return torch.log(exponential)",
        "test_laws",
    ),
    "tiles without their noise": (
        "reference.py",
        "(log_mass + noise).argmax(1)",
        "log_mass.argmax(1)",
        "test_tail_freq",
    ),
    "tiles without their mass": ("reference.py", "(log_mass + noise).argmax(1)", "noise.argmax(1)", "test_tail_freq"),
    "the same noise in every tile": (
        "reference.py",
        "position[:, None], tile_index)",
        "position[:, None], tile_index * 0)",
        "test_independence",
    ),
    "tile mass without its sum": (
        "reference.py",
        "mass.sum(-1).log() + top[..., 0]",
        "top[..., 0]",
        "test_frequencies and normal-5000",
    ),
    "another tile width": ("rng.py", "TILE = 1024", "TILE = 2048", "test_random_cases"),
    "inverse CDF off by one": (
        "reference.py",
        "cdf <= threshold[:, None]",
        "cdf < 0 * threshold[:, None]",
        "test_random",
    ),
    "10 % hotter, peaked": (
        "reference.py",
        "_draw(scaled.where",
        "_draw((scaled / 1.1).where",
        "test_frequencies and peaked-50-12000",
    ),
    "10 % hotter, not so peaked": (
        "reference.py",
        "_draw(scaled.where",
        "_draw((scaled / 1.1).where",
        "test_frequencies and normal-50-12000",
    ),
    "probabilities by the square root": ("reference.py", "cdf = mass[", "cdf = mass.sqrt()[", "test_tail_frequencies"),
    "seed[0] for every row": (
        "reference.py",
        "rng.gumbel(seed[:, None]",
        "rng.gumbel(seed[:1, None]",
        "test_every_seed_and_position",
    ),
    "a number seeds all rows alike": (
        "reference.py",
        "rng.row_seeds(seed, base_logits.shape[0], base_logits.device)",
        "torch.full((base_logits.shape[0],), seed)",
        "test_a_number_seeds_row_b",
    ),
    "0-dim seed is no number": (
        "validation.py",
        "if per_row and value.dim() == 0:",
        "if False:",
        "test_a_number_seeds_row_b",
    ),
    "a batch that matters": (
        "reference.py",
        "threshold = rng.uniform(seed, position)",
        "threshold = rng.uniform(seed + len(seed), position)",
        "test_a_row_does_not_see",
    ),
    "torch's generator": (
        "reference.py",
        "threshold = rng.uniform(seed, position)",
        "threshold = torch.rand(len(seed))",
        "test_global_random_state",
    ),
    "operands changed": (
        "reference.py",
        "    shape, device = (operands[0]",
        "    operands[0].mul_(0.5)\n    shape, device = (operands[0]",
        "test_arguments_are_left",
    ),
    "-inf times weight": (
        "reference.py",
        "allowed = in_mask & ~blocked &",
        "allowed = in_mask &",
        "test_minus_infinity",
    ),
    "an operand of weight 0 forbids": (
        "reference.py",
        "in_use & (x <= torch.finfo(x.dtype).min)",
        "(x <= torch.finfo(x.dtype).min)",
        "test_minus_infinity",
    ),
    "the lowest number is one like others": (
        "reference.py",
        "x <= torch.finfo(x.dtype).min",
        "x == -_INF",
        "test_the_lowest_number",
    ),
    "the lowest number of float32 for all": (
        "reference.py",
        "torch.finfo(x.dtype).min",
        "torch.finfo(torch.float32).min",
        "test_the_lowest_number",
    ),
    "numbers near the lowest": (
        "reference.py",
        "x <= torch.finfo(x.dtype).min",
        "x <= torch.finfo(x.dtype).min * 0.99",
        "test_the_number_above",
    ),
    "a sum below float32 spoils the row": ("reference.py", " & (z != -_INF)", "", "test_sums_beyond"),
    "a sum above float32 is blocked": ("reference.py", "& (z != -_INF)", "& z.isfinite()", "test_sums_beyond"),
    "a draw that is not certain though alone": (
        "reference.py",
        "torch.where(kept == 1, logprob, log_mass)",
        "log_mass",
        "test_no_log_probability or test_certain or test_greedy",
    ),
    "log-probabilities above 0": (
        "reference.py",
        "logprob = _at(scaled, token) - log_total",
        "logprob = _at(scaled, token) - log_total + 6e-8",
        "test_a_certain_token",
    ),
    "denormal numbers flushed in the reference": (
        "guided_step.py",
        "return counting_denormals(implementation.guided_step, inputs, sampling)",
        "return implementation.guided_step(inputs, sampling)",
        "test_flushed_denormal",
    ),
    "denormal numbers flushed in a tensor": (
        "validation.py",
        "counting_denormals(value.to, wanted)",
        "value.to(wanted)",
        "test_flushed_denormal",
    ),
    "denormal weights flushed in a tensor": (
        "validation.py",
        "counting_denormals(value.detach().float)",
        "value.detach().float()",
        "test_flushed_denormal",
    ),
    "the mode not given back": (
        "calls.py",
        "        torch.set_flush_denormal(True)\n",
        "        pass\n",
        "test_flushed_denormal",
    ),
    "seeds s + b": ("rng.py", "SEED_STEP = 0x9E3779B97F4A7C15 - 2**64", "SEED_STEP = 1", "test_batches_of"),
    "a row's seed told wrong": (
        "guided_step.py",
        "row * rng.SEED_STEP",
        "(row + 1) * rng.SEED_STEP",
        "test_a_number_seeds_row_b",
    ),
    "an operand of weight 0 spoils": ("reference.py", "in_use & (x.isnan()", "(x.isnan()", "test_which_poison_counts"),
    "poison behind the mask": ("reference.py", "(in_mask & bad).any(1)", "bad.any(1)", "test_which_poison_counts"),
    "poison hidden by -inf": (
        "reference.py",
        "(in_mask & bad).any(1)",
        "(allowed & bad).any(1)",
        "test_which_poison_counts",
    ),
    "+inf is no poison": ("reference.py", "(x.isnan() | (x == _INF))", "x.isnan()", "test_random_cases"),
    "one bad row spoils all": (
        "reference.py",
        "status = _status(allowed, bad | ~valid)",
        "status = _status(allowed, bad.any() | ~valid)",
        "test_bad_rows_leave",
    ),
    "status 2 before 1": (
        "reference.py",
        "return torch.where(bad, BAD_ROW, nothing).int()",
        "return torch.where(bad & (nothing == 0), BAD_ROW, nothing).int()",
        "test_which_poison_counts",
    ),
    "no status 2": (
        "reference.py",
        "torch.where(allowed.any(1), DRAWN, NO_ALLOWED_TOKEN)",
        "allowed.any(1) * 0",
        "test_no_allowed_token",
    ),
    "weight 0 in the log-probs": (
        "reference.py",
        "_at(x[:, :vocab_size].double().log_softmax(1), token) for x in operands]",
        "_at((x * bool(c))[:, :vocab_size].double().log_softmax(1), token)"
        " for x, c in zip(operands, [1, *weights[0]])]",
        "test_operand_of_weight_zero",
    ),
    "mask bit off by one": ("reference.py", ">> (v % 32) & 1", ">> ((v + 1) % 32) & 1", "test_token_mask_allows"),
    "mask words by the wrong stride": (
        "reference.py",
        "token_mask[:, v // 32]",
        "token_mask[:, v // 31]",
        "test_token_mask_allows",
    ),
    "softmax over masked tokens": (
        "reference.py",
        "return z.where(allowed, -_INF), allowed",
        "return z.where(allowed, -30.0), allowed",
        "test_the_softmax_runs",
    ),
    "own log-softmax under the mask": (
        "reference.py",
        "_at(x[:, :vocab_size].double()",
        "_at(x[:, :vocab_size].where(allowed, -_INF).double()",
        "test_the_softmax_runs",
    ),
    "vocab_size ignored by the log-probs": (
        "reference.py",
        "_at(x[:, :vocab_size].double()",
        "_at(x.double()",
        "test_widths_that_differ",
    ),
    "padding drawn": (
        "validation.py",
        "return base, arms, vocab_size",
        "return base, arms, min(widths)",
        "test_widths_that_differ",
    ),
    "a row for a column of weights": (
        "reference.py",
        "weights.unbind(1)",
        "weights.unbind(int(weights.shape[0] != weights.shape[1]))",
        "test_forms_of_weights",
    ),
    "the last ARM forgotten": (
        "reference.py",
        "for number in weights]",
        "for number in [*weights[:-1], 0.0]]",
        "test_number_of_arms",
    ),
    "greedy takes the last": ("reference.py", "z.argmax(1)", "z.shape[1] - 1 - z.flip(1).argmax(1)", "test_greedy"),
    "greedy keeps its filters": (
        "reference.py",
        "kept = torch.where(greedy, 1, keep.sum(1))",
        "kept = keep.sum(1)",
        "test_greedy",
    ),
    "greedy for all once for one": (
        "reference.py",
        "torch.where(greedy, z.argmax(1)",
        "torch.where(greedy.any(), z.argmax(1)",
        "test_greedy_beside",
    ),
    "temperature -1 is fine": (
        "reference.py",
        "valid = (temperature >= 0)",
        "valid = (temperature >= -2)",
        "test_numbers_out_of_range",
    ),
    "top_p 1.25 is fine": ("reference.py", "(top_p <= 1)", "(top_p <= 2)", "test_numbers_out_of_range"),
    "a number min_p 1.25 is fine": (
        "validation.py",
        '"min_p", min_p, base, 0.0, 1.0',
        '"min_p", min_p, base, 0.0, 2.0',
        "test_numbers_out_of_range",
    ),
    "kept off by one": ("reference.py", "keep.sum(1))", "keep.sum(1) + 1)", "test_filters_small"),
    "top-k off by one": ("reference.py", "start < top_k[:, None]", "start <= top_k[:, None]", "test_filters_small"),
    "top-k cuts ties": ("reference.py", "in_top_k = (start < ", "in_top_k = (index < ", "test_equal_tokens"),
    "top-p cuts ties": ("reference.py", "(1, 0)).gather(1, start)", "(1, 0))", "test_equal_tokens"),
    "only the first is kept for certain": ("reference.py", "| (start == 0)", "| (index == 0)", "test_filters_keep_all"),
    "poison at weight 0": ("reference.py", "in_use & (x.isnan()", "(x.isnan()", "test_poison_that_plays_no_part"),
    "a row without operands is bad": (
        "reference.py",
        "~coefficients.isfinite().all(1)",
        "~coefficients.any(1)",
        "test_no_operand_in_use",
    ),
    "top-p without the token that crosses": (
        "reference.py",
        "(mass_above < top_p",
        "(mass_above + p < top_p",
        "test_filters_small",
    ),
    "top-p of the whole mass": (
        "reference.py",
        "_row_sum(p.where(in_top_k, 0.0))",
        "_row_sum(p)",
        "test_filters_small",
    ),
    "min-p before top-p": (
        "reference.py",
        "_row_sum(p.where(in_top_k, 0.0))",
        "_row_sum(p.where(in_top_k & (p >= min_p[:, None]), 0.0))",
        "test_filters_small",
    ),
    "min-p of the total": ("reference.py", "p >= min_p)", "p / p.sum(1, keepdim=True) >= min_p)", "test_filters_small"),
    "nothing kept at top_p 0": ("reference.py", " | (start == 0)) &", ") &", "test_filters_small"),
    "filters before the temperature": (
        "reference.py",
        "_filter(z, p, top_k",
        "_filter(z, (z - z.amax(1, True)).double().exp(), top_k",
        "test_filters_small",
    ),
    "top_k 0 keeps nothing": ("reference.py", " | (top_k <= 0)[:, None]", "", "test_filters_off"),
    "logprob after the filters": (
        "reference.py",
        "logprob = _at(scaled, token) - log_total",
        "logprob = _at(scaled, token) - log_total - log_mass",
        "test_filters_small",
    ),
    "tokens in another order": (
        "reference.py",
        "torch.zeros_like(keep).scatter(1, order, keep)",
        "keep",
        "test_filters_small",
    ),
    "filters per row ignored": (
        "parameters.py",
        "return (\n            isinstance(top_k, Tensor)",
        "return not isinstance(top_k, Tensor) and (\n            isinstance(top_k, Tensor)",
        "test_parameters_per_row",
    ),
    "int32 parameters read as int64": (
        "validation.py",
        "else counting_denormals(value.to, wanted)",
        "else value.to(wanted) if floating else value.repeat(2).view(wanted)[:rows].contiguous()",
        "test_int32_seed",
    ),
    "half precision": (
        "reference.py",
        "_at(x[:, :vocab_size].double()",
        "_at(x[:, :vocab_size].bfloat16()",
        "test_precision",
    ),
    "z in the operands' type": (
        "reference.py",
        "total.nextafter(toward), total).float()",
        "total.nextafter(toward), total).to(x.dtype).float()",
        "test_precision",
    ),
    "own log-probs at the temperature": (
        "reference.py",
        "[:, :vocab_size].double().log_softmax(1), token)",
        "[:, :vocab_size].double().div(temperature[:, None]).log_softmax(1), token)",
        "test_widths_and_types",
    ),
    "sums in another order": (
        "reference.py",
        "zip(operands, coefficients.split(1, dim=1), strict=True):",
        "reversed(list(zip(operands, coefficients.split(1, dim=1)))):",
        "test_rounding_of_z and order",
    ),
    "rows by 32-bit offsets": (
        "reference.py",
        "x, in_use = operand[:, :vocab_size], weight != 0",
        "x, in_use = operand.as_strided((len(operand), vocab_size), (operand.stride(0) % 2**31, 1)), weight != 0",
        "test_offsets",
    ),
    "strides ignored": (
        "reference.py",
        "x, in_use = operand[:, :vocab_size], weight != 0",
        "x, in_use = operand.as_strided((len(operand), vocab_size), (vocab_size, 1)), weight != 0",
        "test_strides",
    ),
    "z in float64": (
        "reference.py",
        "z = torch.where(in_use, _fma(weight, x, z), z)",
        "z = torch.where(in_use, z.double() + weight.double() * x.double(), z)",
        "test_rounding_of_z and float32",
    ),
    "z rounded twice": (
        "reference.py",
        "torch.where(inexact & ~odd, total.nextafter(toward), total).float()",
        "total.float()",
        "test_rounding_of_z and once",
    ),
    "products rounded": (
        "reference.py",
        "weight.double() * x.double()",
        "(weight * x.float()).double()",
        "test_rounding_of_z and exact",
    ),
    "a row must be there": (
        "reference.py",
        "drawn = status == DRAWN",
        "drawn = status == DRAWN + 0 * status[0]",
        "test_empty_batch",
    ),
    "positions in pairs": (
        "reference.py",
        "gumbel(seed[:, None], position",
        "gumbel(seed[:, None], position // 2",
        "test_independence and position",
    ),
    "seeds in pairs": (
        "reference.py",
        "gumbel(seed[:, None], position",
        "gumbel(seed[:, None] // 2, position",
        "test_independence and seed",
    ),
    "missing detach": (
        "guided_step.py",
        "base_logits=inputs.base_logits.detach(), ",
        "",
        "test_no_output_carries_a_gradient and operands",
    ),
    "log-probs nevertheless": ("guided_step.py", "    if logprobs:\n", "    if True:\n", "test_without_logprobs"),
    "other tokens without log-probs": (
        "reference.py",
        "    if not sampling.logprobs:\n",
        "    if not sampling.logprobs:\n        token = token * 0\n",
        "test_without_logprobs",
    ),
    "raise_for_status mixes reasons": ("outputs.py", "if s == code]", "if s]", "test_raise_for_status"),
    "seeds past 64 bits": (
        "validation.py",
        "<= value < 2**64:",
        "<= value < 2**65:",
        "test_errors_name_the_argument and seed",
    ),
    "an argument not named": (
        "validation.py",
        'f"token_mask: expected torch',
        'f"expected torch',
        "test_errors_name_the_argument and token_mask",
    ),
    "a bool for a number": (
        "validation.py",
        " and not isinstance(value, bool)\n    if not known",
        "\n    if not known",
        "test_errors_name_the_argument and weights-TypeError",
    ),
    "a backend replaced in silence": (
        "backends/__init__.py",
        "    if reason is not None:",
        "    if reason is not None and (name := 'reference') is None:",
        "test_a_named_backend",
    ),
    "a fake that drifted": (
        "outputs.py",
        "token=empty(rows, dtype=torch.int64)",
        "token=empty(rows, dtype=torch.int32)",
        "test_opcheck and guided_step-True",
    ),
    "a fake of another shape": (
        "outputs.py",
        "torch.empty_like(inputs.base_logits, dtype",
        "torch.empty_like(inputs.base_logits[:, :5], dtype",
        "test_opcheck and guided_log_softmax-True",
    ),
    "host synchronisation": (
        "guided_step.py",
        "    if logprobs:\n",
        "    if logprobs and int(outputs[6].sum()) >= 0:\n",
        "test_compile and False",
    ),
    "B burnt into the graph": (
        "guided_step.py",
        "    if is_unseen",
        "    assert f'{inputs.base_logits.shape[0]}'\n    if is_unseen",
        "test_compile and True",
    ),
    "whole: no temperature": (
        "reference.py",
        "/ temperature.double()[:, None]).log_softmax",
        "/ 1).log_softmax",
        "test_whole_distribution",
    ),
    "whole: padding": (
        "reference.py",
        "base_logits.shape[1] - vocab_size), value=-_INF",
        "base_logits.shape[1] - vocab_size), value=0.0",
        "test_widths_that_differ",
    ),
    "whole: no token": (
        "reference.py",
        "(status == NO_ALLOWED_TOKEN)[:, None], -_INF",
        "(status == NO_ALLOWED_TOKEN)[:, None], 0.0",
        "test_no_allowed_token",
    ),
    "whole: NaN": (
        "reference.py",
        "(status == BAD_ROW)[:, None], torch.nan",
        "(status == BAD_ROW)[:, None], 0.0",
        "test_bad_rows_leave",
    ),
    "whole: temperature 0": (
        "guided_log_softmax.py",
        "lowest_temperature=validation.ABOVE_ZERO",
        "lowest_temperature=0.0",
        "test_log_softmax_needs",
    ),
    "whole: any temperature in a tensor": (
        "reference.py",
        "~((temperature > 0)",
        "~((temperature > -2)",
        "test_log_softmax_needs",
    ),
    "gradient: p forgotten": (
        "guided_log_softmax.py",
        "grad - logp.exp() * grad.sum(1, keepdim=True)",
        "grad - grad.sum(1, keepdim=True)",
        "test_gradients",
    ),
    "gradient: temperature forgotten": (
        "guided_log_softmax.py",
        "grad_z = grad_z / temperature",
        "pass",
        "test_gradients",
    ),
    "gradient: weights forgotten": (
        "guided_log_softmax.py",
        "pad(coefficient * grad_z",
        "pad(grad_z",
        "test_gradient_of_one_operand",
    ),
    "gradient: -inf counted": (
        "guided_log_softmax.py",
        "grad = grad.where(logp != -torch.inf, 0.0)",
        "pass",
        "test_gradients",
    ),
    "two arguments of an operator swapped": (
        "parameters.py",
        "flat += [beside_rows, value] if",
        "flat += [value, beside_rows] if",
        "test_the_argument_list_stands_once",
    ),
    "an import too many": (
        "streams.py",
        "import functools\n",
        "import functools\nimport transformers\n",
        "test_imports",
    ),
    "a name that is not there": ("__init__.py", '"run_concurrently"]', '"run_concurrentli"]', "test_public_names"),
    "results in another order": (
        "streams.py",
        "for forward in forwards]",
        "for forward in forwards][::-1]",
        "test_run_concurrently",
    ),
    "not the reference's token": (
        "reference.py",
        "token = torch.where(drawn, token, -1)",
        "token = torch.where(drawn, (token + torch.randint(2, (1,))) % z.shape[1], -1)",
        "test_same_as_the_reference",
    ),
}

# Likewise in genarm_kernels/backends/triton/, for tests of that backend in Triton's interpreter.
TRITON_MUTATIONS = {
    "row without its stride": ("common.py", "x_ptrs[i] + row * x_strides[i]", "x_ptrs[i] + row", "test_strides"),
    "unused operands read": (
        "common.py",
        "tl.where(weight != 0, x.to(tl.float32), 0.0)",
        "x.to(tl.float32)",
        "test_random_cases and 0",
    ),
    "-inf not blocked": (
        "common.py",
        "tl.where(x <= lowest_of(logits[i]), state | 1, state)",
        "state",
        "test_random_cases and 0",
    ),
    "the lowest number passes a usual tile": (
        "tile_pass.py",
        "(tl.min(in_use(x, row_weights[i])) > lowest_of(logits[i - begin]))",
        "True",
        "test_the_lowest_number and 2048",
    ),
    "log-probabilities as they come": ("common.py", "tl.where(x > -6e-7, 0.0, x)", "x + 6e-8", "test_a_certain_token"),
    "NaN not seen": ("common.py", "tl.where(x < INF, state, state | 2)", "state", "test_which_poison"),
    "mask's bits reversed": (
        "common.py",
        "(words >> (v & 31))",
        "(words >> (31 - (v & 31)))",
        "test_token_mask_allows",
    ),
    "mask's stride dropped": (
        "common.py",
        "(first >> 5).to(tl.int64) * mask_stride",
        "(first >> 5).to(tl.int64)",
        "test_token_mask_allows",
    ),
    "rounding of a large reference": (
        "common.py",
        "tl.abs(top * scale) < 1048576.0",
        "scale > 0",
        "test_extreme_scales",
    ),
    "tiles merged without their references": (
        "common.py",
        "sums.to(tl.float64) * tl.exp2(exponent)",
        "sums.to(tl.float64)",
        "test_random_cases and 0",
    ),
    "seed's number without the row": (
        "row_pass.py",
        "numbers[4] + row * SEED_STEP",
        "numbers[4]",
        "test_random_cases and 0",
    ),
    "position without effect": ("common.py", "(position & 0xFFFFFFFF)", "(position & 0)", "test_same_as_the_reference"),
    "purposes mixed": ("common.py", "tile * 0 + PURPOSE", "tile * 0", "test_same_as_the_reference and 0"),
    "no Kahan": (
        "common.py",
        "tl.where(rest == 1.0, c, tl.log(rest) * (c / (rest - 1.0)))",
        "-tl.log(rest)",
        "test_random_numbers",
    ),
    "ties of tiles to the last": (
        "row_pass.py",
        "winner = tl.minimum(winner, tl.min(tl.where(tops == top, tile, 0x7FFFFFFF)))",
        "winner = tl.max(tl.where(tops == top, tile, -1))",
        "test_greedy",
    ),
    "greedy takes the last": (
        "row_pass.py",
        "tl.min(tl.where(z == top, offset, TILE))",
        "tl.max(tl.where(z == top, offset, 0))",
        "test_greedy",
    ),
    "equals of the boundary dropped": (
        "row_pass.py",
        "above = other_z[:, None] > z[None, :]",
        "above = other_z[:, None] >= z[None, :]",
        "test_filters_keep_all_of_equal_rows or test_filters_small",
    ),
    "top-p of the whole mass": (
        "row_pass.py",
        "        mass = tl.sum(tl.where(in_top_k, p, 0.0).to(tl.float64))\n",
        "        mass = mass\n",
        "test_filters_small",
    ),
    "a bound too high": (
        "row_pass.py",
        "good = (weight <= target) if BY_MASS else (weight >= target)",
        "good = (weight <= target * 2) if BY_MASS else (weight * 2 >= target)",
        "test_same_as_the_reference or test_random_cases",
    ),
    "the search forgets what is above": (
        "row_pass.py",
        "above = tl.max(tl.where(reached, above, at))",
        "above = above",
        "test_rows_that_overflow",
    ),
    "the search takes one more": (
        "row_pass.py",
        "reached = at >= target",
        "reached = at > target",
        "test_rows_that_overflow",
    ),
    "keys that do not order negatives": (
        "common.py",
        "tl.where(bits >= 0, bits, (bits ^ 0x7FFFFFFF) + 1)",
        "bits",
        "test_rows_that_overflow",
    ),
    "a full buffer taken for all": (
        "row_pass.py",
        "buffered = count <= CANDIDATES\n    listed",
        "buffered = count <= 2 * CANDIDATES\n    listed",
        "test_rows_that_overflow",
    ),
    "one block of groups listed": ("row_pass.py", "listed += tl.sum(", "listed = tl.sum(", "test_rows_that_overflow"),
    "one block of tiles merged": (
        "common.py",
        "total += tl.sum(relative",
        "total = tl.sum(relative",
        "test_rows_that_overflow",
    ),
    "one block of tiles raced": (
        "row_pass.py",
        "tl.where(soonest < best, first, winner)",
        "first",
        "test_rows_that_overflow",
    ),
    "groups' weights of before": (
        "row_pass.py",
        "        tl.store(weights_ptr + group, tl.zeros([LISTED], tl.float32), mask=group < groups)\n",
        "        pass\n",
        "test_rows_that_overflow",
    ),
    "kept counts by groups": ("row_pass.py", "kept += tl.sum(", "kept = tl.sum(", "test_rows_that_overflow"),
    "float32 in the inverse CDF": (
        "row_pass.py",
        "scale), 0.0).to(tl.float64)\n    cdf",
        "scale), 0.0)\n    cdf",
        "test_tail",
    ),
    "log-probabilities of the filtered": (
        "row_pass.py",
        "log_mass_of_row = tl.log(mass)",
        "log_mass_of_row = tl.log(kept_mass)",
        "test_random_cases and 0",
    ),
    "an operand's log-softmax masked": (
        "tile_pass.py",
        "mask=v < vocab, other=-INF).to(tl.float32)",
        "mask=v < vocab - 1, other=-INF).to(tl.float32)",
        "test_random_cases and 0",
    ),
    "the fast path keeps NaN": (
        "tile_pass.py",
        "(tl.sum(z * 0.0) == 0) & ",
        "",
        "test_random_cases and 0",
    ),
}


# Runs in a process forked from one that has imported torch: a second each in place of many.
CHILD = """
import os, sys
os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT), 1)
sys.path.insert(0, os.getcwd())
sys.dont_write_bytecode = True
import pytest
files = ["tests/test_rng.py", "tests/test_guided_step.py", "tests/test_triton.py"]
code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", *files, "-k", expression])
assert sys.modules["genarm_kernels.reference"].__file__.startswith(os.getcwd()), "the installed package was tested"
sys.exit(100 + code)
"""
PASSED, FAILED = 100, 101  # other codes: no test ran, or an error outside of a test


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package and its tests, where a child finds them before the installed ones."""
    for folder in ("genarm_kernels", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(expression: str, whose: str = "not cpu and not triton") -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo.testing", "scipy.stats", "pytest"])
    child = context.Process(target=exec, args=(CHILD, {"expression": f"({expression}) and {whose}"}))
    child.start()
    child.join()
    return child.exitcode


def test_without_a_mutation_the_tests_pass(copy: Path) -> None:
    assert outcome("test_philox or test_greedy or test_filters or test_errors") == PASSED, Path("log").read_text()


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(copy: Path, name: str) -> None:
    file, text, mistake, expression = MUTATIONS[name]
    mutate(copy / "genarm_kernels" / file, text, mistake)
    assert outcome(expression) == FAILED, Path("log").read_text()


@pytest.mark.parametrize("name", TRITON_MUTATIONS)
def test_mutation_of_the_triton_kernels_is_caught(copy: Path, name: str) -> None:
    file, text, mistake, expression = TRITON_MUTATIONS[name]
    mutate(copy / "genarm_kernels" / "backends" / "triton" / file, text, mistake)
    assert outcome(expression, "triton") == FAILED, Path("log").read_text()


def mutate(path: Path, text: str, mistake: str) -> None:
    source = path.read_text()
    assert source.count(text) == 1, f"{path.name} holds {text!r} {source.count(text)} times"
    path.write_text(source.replace(text, mistake))
