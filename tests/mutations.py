"""Removes or alters each collective, division, weight, fold-in and donation of the library in turn, and runs a test.

`python tests/mutations.py` prints which test caught each one, and fails if any is left; with a word, only the mutations
whose name holds it.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONTRACTS, COMPILED = "tests/test_contracts.py::test_", "tests/test_compiled.py::test_"
RANDOMNESS, EQUIVALENCE = "tests/test_randomness.py::test_", "tests/test_equivalence.py::test_"
INSPECTION = "tests/test_inspection.py::test_"
GPU = "tests/test_gpu_programs.py::test_"
CELL = EQUIVALENCE + "every_strategy_trains_like_one_device"
OWN_CELL = EQUIVALENCE + "shards_and_microbatches_together_train_like_one_device"
PADDING = CONTRACTS + "padding_counts_for_nothing"
FLOAT16 = CONTRACTS + "float16_divides_its_scale_out_and_skips_a_step_that_overflows[data]"
MASKS = RANDOMNESS + "no_two_rows_steps_shards_or_microbatches_draw_the_same_mask"
EVALUATE = CONTRACTS + "evaluate_is_exact_with_a_short_last_batch"


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    # Collectives.
    Mutation(
        "gradients and loss not summed over shards",
        "train.py",
        "gradients, values = jax.lax.psum((sums.gradients, sums.values), plan.axes)",
        "gradients, values = sums.gradients, sums.values",
        PADDING + "[pmap]",
    ),
    Mutation(
        "loss and weights not summed over shards",
        "train.py",
        "gradients, values = jax.lax.psum((sums.gradients, sums.values), plan.axes)",
        "gradients, values = jax.lax.psum(sums.gradients, plan.axes), sums.values",
        PADDING + "[pmap]",
    ),
    Mutation(
        "gradients averaged, not summed",
        "train.py",
        "gradients, values = jax.lax.psum((sums.gradients, sums.values), plan.axes)",
        "gradients, values = jax.lax.pmean((sums.gradients, sums.values), plan.axes)",
        MASKS + "[pmap-1]",
    ),
    Mutation(
        "model state not averaged over shards",
        "train.py",
        "jax.lax.pmean(leaf, plan.axes) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf",
        "leaf",
        CONTRACTS + "state_that_differs_by_shard_is_averaged_under_pmap",
    ),
    Mutation(
        "eval sums not summed over shards",
        "evaluation.py",
        "jax.lax.psum(sums, axes) if axes else sums",
        "sums",
        EVALUATE + "[pmap]",
    ),
    Mutation(
        "drift over devices not told",
        "data_parallel.py",
        "if drifts:",
        "if False:",
        CONTRACTS + "a_step_of_ones_own_that_lacks_a_reduction_is_named_under_pmap",
    ),
    Mutation(
        "microbatches left to the compiler over data",
        "sharded.py",
        "return (AXIS_NAME,) if is_manual and not would_abort else ()",
        "return ()",
        COMPILED + "data_parallel_gradients_are_reduced_once_a_step_in_one_collective[4-data]",
    ),
    Mutation(
        "stages manual over data beside fsdp",
        "sharded.py",
        "if is_manual and not would_abort else",
        "if is_manual else",
        "tests/test_pipeline.py::test_data_is_left_to_the_compiler_where_it_would_end_the_process_over_a_look_up",
    ),
    Mutation(
        "microbatches manual over an axis that splits parameters",
        "sharded.py",
        " and AXIS_NAME not in splits",
        "",
        COMPILED + "microbatches_gather_split_weights_and_reduce_their_gradients_in_the_loop[data]",
    ),
    Mutation(
        "a scan's carry left to the compiler over an axis that splits weights too",
        "sharded.py",
        "return split_carries(fn, leaf.shape[0], constrain_rows)",
        "return fn",
        COMPILED + "a_models_own_scan_gets_its_weights_gathered_and_never_the_rows_of_all_devices[nnx_scanned]",
    ),
    Mutation(
        "a stage's rows left to the compiler over an axis that splits weights too",
        "stack.py",
        "jax.tree.map(_split_rows, x), leaves)[0]",
        "x, leaves)[0]",
        COMPILED + "stacked_layers_get_their_weights_gathered_and_never_the_rows_of_all_devices[sizes3-1]",
    ),
    Mutation(
        "two scans' constraints given the variables of one",
        "carries.py",
        "jax.make_jaxpr(lambda x: constrain(x))",
        "jax.make_jaxpr(constrain)",
        "tests/test_carries.py::test_values_and_gradients_stay_as_they_are[bare]",
    ),
    Mutation(
        "what a scan cuts into slices split by its layers",
        "carries.py",
        "atom.aval.shape == body.aval.shape and atom",
        "atom",
        "tests/test_carries.py::test_values_and_gradients_stay_as_they_are[bare]",
    ),
    # What `inspect` counts.
    Mutation(
        "an all-reduce counted as half of what it sends",
        "inspection/collectives.py",
        '"all-reduce": 2 * (size - 1) / size,',
        '"all-reduce": (size - 1) / size,',
        INSPECTION + "data_parallel_sends_its_gradients_once_to_the_byte[data-1]",
    ),
    Mutation(
        "on GPU every start taken for asynchronous",
        "inspection/collectives.py",
        """one.opcode.endswith("-start") and '"is_sync":true' not in one.text""",
        'one.opcode.endswith("-start")',
        GPU + "what_its_own_end_follows_at_once_is_not_asynchronous",
    ),
    Mutation(
        "on GPU gradients laid flat taken for one array",
        "inspection/operands.py",
        "pieces = list(_pieces(program, computation, each)) or [",
        "pieces = [",
        GPU + "gradients_laid_flat_behind_one_another_count_each_by_itself",
    ),
    Mutation(
        "on GPU an end counted as what it ends",
        "inspection/hlo.py",
        'instruction.opcode.endswith(("-update", "-done"))',
        "False",
        GPU + "a_wrapped_collective_that_all_its_stages_name_counts_once",
    ),
    Mutation(
        "on GPU the order of a mesh's devices forgotten",
        "inspection/groups.py",
        "_read_order(match[2])[groups] if match[2] else groups",
        "groups",
        GPU + "of_a_ragged_exchange_that_starts_and_ends_apart_the_smaller_end_counts",
    ),
    Mutation(
        "a surplus gather taken for needed",
        "inspection/bounds.py",
        "max(need for need in terms.gathers if need <= max(gathers, 1))",
        "max(gathers, 1)",
        INSPECTION + "a_gather_more_than_a_step_needs_is_above_the_bound",
    ),
    Mutation(
        "what Ulysses exchanges not declared",
        "inspection/declared.py",
        "if not before or not after or before == after:",
        "if True:",
        INSPECTION + "what_an_island_sends_is_its_own_bound",
    ),
    Mutation(
        "a gather in zeros counted as a sum alone",
        "inspection/collectives.py",
        "self.bytes_a_step // 2 if self.lies_in_zeros else self.bytes_a_step",
        "self.bytes_a_step",
        INSPECTION + "a_gather_written_as_a_sum_is_told_with_both_its_counts",
    ),
    Mutation(
        "a loop's step taken for one",
        "inspection/hlo.py",
        "math.ceil((bound - start) / steps[0])",
        "bound - start",
        INSPECTION + "a_loops_trips_are_read_from_its_counter",
    ),
    Mutation(
        "each part of a sum summed by itself",
        "inspection/partials.py",
        "if name in _SUMS and all(",
        "if name in () and all(",
        INSPECTION + "tensor_parallel_sums_are_four_a_layer_and_those_of_the_vocabulary",
    ),
    Mutation(
        "the products of a loop counted once",
        "inspection/flops.py",
        "times * _repeats(eqn)",
        "times",
        INSPECTION + "operations_are_those_of_the_closed_form[data]",
    ),
    # Divisions and fractions.
    Mutation(
        "microbatches not counted in the fraction",
        "train.py",
        "fraction = 1 / (shards * plan.num_microbatches)",
        "fraction = 1 / shards",
        OWN_CELL + "[fsdp-8-nnx_mlp-dropout_microbatches]",
    ),
    Mutation(
        "shards not counted in the fraction",
        "train.py",
        "fraction = 1 / (shards * plan.num_microbatches)",
        "fraction = 1 / plan.num_microbatches",
        MASKS + "[pmap-1]",
    ),
    Mutation(
        "a part of a mean not made a fraction",
        "loss.py",
        "mean if fraction == 1 else mean * fraction",
        "mean",
        MASKS + "[pmap-1]",
    ),
    Mutation(
        "a weighted total not made a fraction",
        "loss.py",
        "return Weighted(grow(total).sum() * (fraction / rows), ",
        "return Weighted(grow(total).sum(), ",
        OWN_CELL + "[pmap-8-nnx_mlp-masked_microbatches]",
    ),
    Mutation(
        "gradients not divided by the total weight",
        "train.py",
        "factor = jnp.where(take, 1 / jnp.where(take, weight, 1), 0)",
        "factor = jnp.where(take, 1.0, 0)",
        PADDING + "[data]",
    ),
    Mutation(
        "the loss not divided by the total weight",
        "loss.py",
        "value.total / jnp.where(value.weight == 0, 1, value.weight)",
        "value.total",
        PADDING + "[data]",
    ),
    Mutation(
        "eval fraction forgotten",
        "evaluation.py",
        "fraction = 1 / math.prod(jax.lax.axis_size(axis) for axis in axes)",
        "fraction = 1",
        EVALUATE + "[pmap]",
    ),
    Mutation(
        "batches of an evaluation count alike, whatever their rows",
        "evaluation.py",
        "Weighted(value.total * num_rows, num_rows if value.weight is None else value.weight * num_rows)",
        "Weighted(value.total, 1 if value.weight is None else value.weight)",
        EVALUATE + "[data]",
    ),
    Mutation(
        "float16's scale not multiplied in",
        "train.py",
        "(total if carry.scale is None else total * carry.scale)",
        "total",
        FLOAT16,
    ),
    Mutation(
        "float16's scale not divided out",
        "train.py",
        "factor = (1 if factor is None else factor) / dynamic_scale.scale",
        "factor = 1 if factor is None else factor",
        FLOAT16,
    ),
    # Weights.
    Mutation(
        "padding weighs as much as an example",
        "batch.py",
        "np.concatenate([weight, np.zeros(target - rows, np.float32)])",
        "np.concatenate([weight, np.ones(target - rows, np.float32)])",
        PADDING + "[data]",
    ),
    Mutation(
        "example weights not multiplied into the loss",
        "loss.py",
        "Weighted((value * weight).sum() * (fraction / rows)",
        "Weighted(value.sum() * (fraction / rows)",
        PADDING + "[data]",
    ),
    Mutation(
        "example weights not multiplied into Weighted",
        "loss.py",
        "total, mass = total * weight, mass * weight",
        "pass",
        EVALUATE + "[data]",
    ),
    Mutation(
        "example weights not multiplied into rows",
        "evaluation.py",
        "Weighted((means * weight).sum(), weight.sum())",
        "Weighted(means.sum(), weight.sum())",
        EVALUATE + "[data]",
    ),
    Mutation(
        "a step of weight 0 is taken",
        "train.py",
        "take = weight != 0",
        "take = weight >= 0",
        CONTRACTS + "a_batch_that_weighs_nothing_gives_loss_zero_and_no_update[data]",
    ),
    Mutation(
        "an overflow is taken",
        "train.py",
        "take = finite if take is None else take & finite",
        "pass",
        FLOAT16,
    ),
    # Fold-ins and rows.
    Mutation(
        "nothing folded into keys",
        "loss.py",
        "        key = jax.random.fold_in(key, number)",
        "        pass",
        MASKS + "[data-4]",
    ),
    Mutation(
        "nothing folded into nnx's own keys",
        "loss.py",
        "    if not is_key(leaf):\n        return leaf\n    # A",
        "    if True:\n        return leaf\n    # A",
        MASKS + "[data-4]",
    ),
    Mutation(
        "the shard not folded in",
        "train.py",
        "device = (jax.lax.axis_index(plan.axes),) if plan.axes else ()",
        "device = ()",
        MASKS + "[pmap-1]",
    ),
    Mutation(
        "the step not folded in",
        "train.py",
        "keys = (carry.rng, carry.step, number, *device, *extra)",
        "keys = (carry.rng, number, *device, *extra)",
        MASKS + "[pmap-1]",
    ),
    Mutation(
        "the microbatch not folded in",
        "train.py",
        "keys = (carry.rng, carry.step, number, *device, *extra)",
        "keys = (carry.rng, carry.step, *device, *extra)",
        MASKS + "[fsdp-4]",
    ),
    Mutation(
        "the row not folded in where rows are taken one by one",
        "loss.py",
        "values, _ = call(jax.tree.unflatten(treedef, lone), (row,))",
        "values, _ = call(jax.tree.unflatten(treedef, lone), ())",
        RANDOMNESS + "rows_that_are_taken_one_by_one_for_their_weights_draw_masks_of_their_own[fsdp]",
    ),
    Mutation(
        "the shard not folded in by an eval step",
        "evaluation.py",
        "device = (jax.lax.axis_index(axes),) if axes else ()",
        "device = ()",
        RANDOMNESS + "no_two_shards_of_an_eval_step_draw_the_same[pmap]",
    ),
    Mutation(
        "a microbatch made of neighbours",
        "train.py",
        "jnp.moveaxis(leaf.reshape(-1, count, *leaf.shape[1:]), 1, 0)",
        "leaf.reshape(count, -1, *leaf.shape[1:])",
        CONTRACTS + "batch_statistics_are_those_of_the_global_batch_or_microbatch[data-4]",
    ),
    # Donation and layout.
    Mutation(
        "no donation under jit",
        "sharded.py",
        "donate_argnums=(0,) if carries_state and not looks_for_nans() else (),",
        "donate_argnums=(),",
        CONTRACTS + "a_step_takes_over_its_states_buffers_and_gives_them_back_laid_out_alike[data]",
    ),
    Mutation(
        "no donation under pmap",
        "data_parallel.py",
        "donate_argnums=(0,) if carries_state and not looks_for_nans() else (),",
        "donate_argnums=(),",
        CONTRACTS + "a_step_takes_over_its_states_buffers_and_gives_them_back_laid_out_alike[pmap]",
    ),
    Mutation(
        "a step's own new key dropped",
        "sharded.py",
        "changed = None if after.rng is given.rng else jax.lax.with_sharding_constraint(after.rng, sharding)",
        "changed = None",
        "tests/test_strategy.py::test_a_step_of_ones_own_may_give_back_a_key_of_its_own[data]",
    ),
    Mutation(
        "the layout of a step's own new key left to the compiler",
        "sharded.py",
        "else jax.lax.with_sharding_constraint(after.rng, sharding)",
        "else after.rng",
        "tests/test_strategy.py::test_a_new_key_lies_as_the_old_one_did",
    ),
    Mutation(
        "a key put into the state left where it was made",
        "sharded.py",
        "rng = jax.device_put(rng, sharding)",
        "pass",
        "tests/test_strategy.py::test_a_key_put_into_the_state_is_laid_out_by_the_next_step[data]",
    ),
    Mutation(
        "the state's layout after a step left to the compiler",
        "sharded.py",
        "out_shardings=(state_shardings, None) if carries_state else None,",
        "out_shardings=None,",
        CONTRACTS + "a_step_takes_over_its_states_buffers_and_gives_them_back_laid_out_alike[zero1]",
    ),
    Mutation(
        "the state's layout at init left to the compiler",
        "strategy.py",
        "_split_init(init_fn)(rng)), out_shardings=layout.shardings)",
        "_split_init(init_fn)(rng)))",
        CONTRACTS + "each_device_holds_its_share_of_parameters_and_moments[fsdp]",
    ),
    Mutation(
        "parameters gathered before they are cast",
        "strategy.py",
        'strategy.engine.constrain(leaf.astype(dtype), specs["params/" + leaf_path(path)])',
        "leaf.astype(dtype)",
        COMPILED + "bf16_compute_gathers_split_parameters_in_bf16",
    ),
    Mutation(
        "gradients not kept split while they are summed",
        "train.py",
        "return plan.strategy.engine.constrain(leaf, spec) if any(spec) else leaf",
        "return leaf",
        COMPILED + "the_sum_of_gradients_over_microbatches_stays_split",
    ),
]

CONTEXT = "tests/test_context.py::test_"
RING = CONTEXT + "attention_and_its_gradients_are_those_of_the_definition_in_float64"
ULYSSES = CONTEXT + "ulysses_exchanges_within_context_alone_and_once_for_each_array[mesh1]"
BALANCE = CONTEXT + "zigzag_gives_each_device_the_same_work_in_every_hop"
MUTATIONS += [
    Mutation(
        "keys not sent on in the ring",
        "context.py",
        "return _over_pairs(add, rows, keys, sums, ())[0], following",
        "return _over_pairs(add, rows, keys, sums, ())[0], keys",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "a hop of the ring forgotten",
        "context.py",
        "lax.fori_loop(0, kernel.size - 1, step, (sums, keys))",
        "lax.fori_loop(0, kernel.size - 2, step, (sums, keys))",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "the ring skips every other device",
        "context.py",
        "[(i, (i + 1) % kernel.size) for i in range(kernel.size)]",
        "[(i, (i + 2) % kernel.size) for i in range(kernel.size)]",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "keys not sent on in the ring's backward pass",
        "context.py",
        "return grads_q, _hop(kernel, grads), following",
        "return grads_q, _hop(kernel, grads), keys",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "gradients of keys not sent on with the keys",
        "context.py",
        "return grads_q, _hop(kernel, grads), following",
        "return grads_q, grads, following",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "gradients of keys not sent home",
        "context.py",
        "jnp.add, grads, _hop(kernel, others))",
        "jnp.add, grads, others)",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "keys not sent before the backward pass's second device",
        "context.py",
        "(grads_q, zeros, _hop(kernel, keys))",
        "(grads_q, zeros, keys)",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "a device's gradients of its own keys forgotten",
        "context.py",
        "grads = jax.tree.map(jnp.add, grads, _hop(kernel, others))",
        "grads = _hop(kernel, others)",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "a hop more than the ring needs",
        "context.py",
        "lax.fori_loop(0, kernel.size - 2, step, (grads_q",
        "lax.fori_loop(0, kernel.size - 1, step, (grads_q",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "the ring manual over every axis",
        "context.py",
        "axis_names={_AXIS}, check_vma=False",
        "check_vma=False",
        CONTEXT + "a_ring_beside_data_and_model_gathers_neither_rows_nor_heads",
    ),
    Mutation(
        "few key/value heads whole on every shard of model",
        "context.py",
        "copies = 1 if heads % parts else",
        "copies = 1 if True else",
        CONTEXT + "key_value_heads_fewer_than_model_are_spread_over_it",
    ),
    Mutation(
        "a token doesn't see itself",
        "context.py",
        "seen_BCS = theirs.numbers[:, None] <= ours",
        "seen_BCS = theirs.numbers[:, None] < ours",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "a segment sees those before it",
        "context.py",
        "jnp.asarray(segment_ids), ~jnp.asarray(segment_ids))",
        "jnp.asarray(segment_ids))",
        RING + "[ring_of_8_packed]",
    ),
    Mutation(
        "positions forgotten",
        "context.py",
        "jnp.arange(t) if positions is None else jnp.asarray(positions))",
        "jnp.arange(t))",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "blocks skipped that are hidden in part",
        "context.py",
        "theirs.lowest <= ours.highest",
        "theirs.highest <= ours.lowest",
        RING + "[ring_of_4_zigzag]",
    ),
    Mutation(
        "a block that one number lets in is skipped",
        "context.py",
        "theirs.lowest <= ours.highest",
        "theirs.lowest < ours.highest",
        RING + "[ring_of_8_packed]",
    ),
    Mutation("hidden blocks not skipped", "context.py", "            if not seen:", "            if True:", BALANCE),
    Mutation(
        "what fills up the last block is seen",
        "context.py",
        "if length % kernel.block_size:",
        "if False:",
        RING + "[one_device]",
    ),
    Mutation(
        "the first of what fills up the last block is seen",
        "context.py",
        "places >= length",
        "places > length",
        RING + "[one_device]",
    ),
    Mutation(
        "blocks don't come back in their own length",
        "context.py",
        "return x[:, : like.shape[1]].astype",
        "return x[:, -like.shape[1] :].astype",
        RING + "[one_device]",
    ),
    Mutation(
        "values not brought down to a new highest score",
        "context.py",
        "out_BKGCD * shrink_BKGC[..., None] + added",
        "out_BKGCD + added",
        RING + "[one_device]",
    ),
    Mutation(
        "totals not brought down to a new highest score",
        "context.py",
        "total_BKGC * shrink_BKGC + weights",
        "total_BKGC + weights",
        RING + "[one_device]",
    ),
    Mutation(
        "-inf taken from -inf",
        "context.py",
        "jnp.where(highest_BKGC == -jnp.inf, 0, highest_BKGC)",
        "highest_BKGC",
        RING + "[ring_multi_query_in_3_axes]",
    ),
    Mutation("the mean pull not taken off", "context.py", "- mean_BKGC[..., None]\n", "\n", RING + "[one_device]"),
    Mutation(
        "the scale left out of the gradient",
        "context.py",
        "weights_BKGCS * pulls_BKGCS * kernel.scale",
        "weights_BKGCS * pulls_BKGCS",
        RING + "[one_device]",
    ),
    Mutation(
        "sums in float32 whatever the input",
        "context.py",
        "preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)",
        "preferred_element_type=jnp.float32",
        RING + "[one_device]",
    ),
    Mutation("heads cross model in Ulysses", "context.py", '("model", _AXIS)\n', '(_AXIS, "model")\n', ULYSSES),
    Mutation(
        "heads left where they are in Ulysses",
        "context.py",
        "if size > 1 else ((), ())",
        "if False else ((), ())",
        ULYSSES,
    ),
    Mutation(
        "Ulysses' output saved as the next layer takes it",
        "context.py",
        "_constrain(_from_blocks(out_NBCKGD, q_BTHD), kernel.spec)",
        "_from_blocks(out_NBCKGD, q_BTHD)",
        ULYSSES,
    ),
    Mutation(
        "what goes into Ulysses not split by its tokens first",
        "context.py",
        "arrays = [_constrain(x, by_token, by_head) for x in",
        "arrays = [_constrain(x, by_head) for x in",
        INSPECTION + "what_an_island_sends_is_its_own_bound[ulysses_attention-sizes_of_mesh1-49152]",
    ),
    Mutation(
        "what comes out of Ulysses left as the layers after split it",
        "context.py",
        "return _constrain(_attend(kernel, *arrays, masks), by_head, by_token)",
        "return _attend(kernel, *arrays, masks)",
        CONTEXT + "ulysses_between_layers_moves_heads_for_tokens_and_nothing_else",
    ),
    Mutation(
        "masks left split in Ulysses",
        "context.py",
        "_constrain(mask, by_head[:1])",
        "mask",
        CONTEXT + "ulysses_gathers_the_masks_alone",
    ),
    Mutation(
        "zigzag pairs parts that aren't as far from the ends",
        "sequence.py",
        "(parts[i], parts[-1 - i])",
        "(parts[i], parts[i + size])",
        BALANCE,
    ),
    Mutation(
        "positions not moved with their tokens",
        "sequence.py",
        "positions[..., order] +",
        "positions +",
        CONTEXT + "zigzag_moves_every_sequence_and_says_where_its_tokens_were",
    ),
    Mutation(
        "blocks as long as the sequence",
        "context.py",
        "-(-length // -(-length // int(block_size)))",
        "length",
        CONTEXT + "memory_grows_with_the_length_and_not_its_square[ring_gradient]",
    ),
    Mutation(
        "keys' heads of another group",
        "context.py",
        "[kv_heads, rest[0] // kv_heads, *rest[1:]]",
        "[rest[0] // kv_heads, kv_heads, *rest[1:]]",
        RING + "[ring_beside_model]",
    ),
    Mutation(
        "sequences not split",
        "context.py",
        "return _constrain(x, (axes,))",
        "return x",
        CONTEXT + "split_sequences_hold_a_share_of_the_activations_between_split_layers",
    ),
    Mutation(
        "context not split further",
        "context.py",
        "dict.fromkeys((_AXIS, axis))",
        "(axis,)",
        CONTEXT + "split_sequence_splits_tokens_over_context_and_then_its_axis",
    ),
]

PIPELINE, EXPERT = "tests/test_pipeline.py::test_", "tests/test_expert.py::test_"
TRAINS = EQUIVALENCE + "a_pipeline_trains_like_one_device"
MIXED = EXPERT + "a_mixture_and_its_gradients_are_one_devices_on_every_mesh"
MUTATIONS += [
    Mutation(
        "sent the wrong way",
        "stack.py",
        "(i + 1, i) if back else (i, i + 1)",
        "(i, i + 1) if back else (i + 1, i)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "pulls sent forward",
        "pipeline_loss.py",
        "send(pull, flow.stages, back=True)",
        "send(pull, flow.stages)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "activations not sent 1f1b",
        "pipeline_loss.py",
        "(send(y, flow.stages), send(pull",
        "(y, send(pull",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "activations not sent gpipe",
        "pipeline.py",
        "return (send(y, flow.stages), out), None",
        "return (y, out), None",
        TRAINS + "[stages-pipeline-0.3-1]",
    ),
    Mutation(
        "pulls not sent",
        "pipeline_loss.py",
        "send(pull, flow.stages, back=True), kept",
        "pull, kept",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "first stage takes what was sent",
        "pipeline.py",
        "jnp.where(stage == 0, take_rows",
        "jnp.where(stage == 1, take_rows",
        TRAINS + "[stages-pipeline-0.3-1]",
    ),
    Mutation(
        "rows in blocks, not strided",
        "stack.py",
        "parts = jnp.reshape(leaf, (-1, count, *np.shape(leaf)[1:]))\n    return lax.dynamic_index_in_dim(parts, jnp.clip(number, 0, count - 1), 1, keepdims=False)",  # noqa: E501
        "parts = jnp.reshape(leaf, (count, -1, *np.shape(leaf)[1:]))\n    return lax.dynamic_index_in_dim(parts, jnp.clip(number, 0, count - 1), 0, keepdims=False)",  # noqa: E501
        TRAINS + "[stages-pipeline-0.3-1]",
    ),
    Mutation(
        "rows joined in blocks",
        "pipeline.py",
        "return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])",
        "return parts.reshape(-1, *parts.shape[2:])",
        PIPELINE + "what_a_layer_is_given_besides_is_whole_for_every_microbatch",
    ),
    Mutation(
        "always active gpipe",
        "pipeline.py",
        "return when(is_active(number), do,",
        "return when(number >= -count, do,",
        PIPELINE + "idle_ticks_run_no_layer_and_other_stages_neither_embedding_nor_head[pipeline]",
    ),
    Mutation(
        "one tick too few gpipe",
        "pipeline.py",
        "jnp.arange(count + flow.stages - 1)",
        "jnp.arange(count + flow.stages - 2)",
        TRAINS + "[stages-pipeline-0.3-1]",
    ),
    Mutation(
        "every stage puts",
        "pipeline.py",
        "leaf: leaf[-1], jit_island",
        "leaf: leaf[0], jit_island",
        TRAINS + "[stages-pipeline-0.3-1]",
    ),
    Mutation(
        "one tick too few 1f1b",
        "pipeline_loss.py",
        "jnp.arange(count + 2 * flow.stages - 2)",
        "jnp.arange(count + 2 * flow.stages - 3)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "ring too short",
        "pipeline_loss.py",
        "depth, count = lax.axis_index(STAGE), 2 * flow.stages - 1,",
        "depth, count = lax.axis_index(STAGE), flow.stages,",
        TRAINS + "[stage-1f1b-0.0-1]",
    ),
    Mutation(
        "ring of all",
        "pipeline_loss.py",
        "depth, count = lax.axis_index(STAGE), 2 * flow.stages - 1,",
        "depth, count = lax.axis_index(STAGE), flow.microbatches,",
        PIPELINE + "1f1b_needs_no_more_memory_for_more_microbatches",
    ),
    Mutation(
        "gpipe loss always active",
        "pipeline_loss.py",
        "return when(is_active(number), forward,",
        "return when(number >= -9, forward,",
        PIPELINE + "idle_ticks_run_no_layer_and_other_stages_neither_embedding_nor_head[gpipe]",
    ),
    Mutation(
        "last stage forwards too",
        "pipeline_loss.py",
        "when(stage < flow.stages - 1, lambda x: run.layers",
        "when(stage < flow.stages, lambda x: run.layers",
        PIPELINE + "idle_ticks_run_no_layer_and_other_stages_neither_embedding_nor_head[1f1b]",
    ),
    Mutation(
        "embedding of gpipe at all",
        "pipeline_loss.py",
        "x = when(stage == 0, lambda x: run.first",
        "x = when(stage < 1 + flow.stages, lambda x: run.first",
        TRAINS + "[stage_model-gpipe-0.0-1]",
    ),
    Mutation(
        "fill idle backward",
        "pipeline_loss.py",
        "pull, more, more_sums = when(active, backward, nothing, x, pull, number, anyone=anyone)",
        "pull, more, more_sums = backward(x, pull, number)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "fill idle forward",
        "pipeline_loss.py",
        "x, y = when(active, forward, lambda x, number: (x, x), x, number, anyone=anyone)",
        "x, y = forward(x, number)",
        PIPELINE + "idle_ticks_run_no_layer_and_other_stages_neither_embedding_nor_head[1f1b]",
    ),
    Mutation(
        "head at another stage",
        "pipeline_loss.py",
        "head, pull, sums = when(stage == flow.stages - 1, through",
        "head, pull, sums = when(stage == flow.stages - 2, through",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "head at every stage",
        "pipeline_loss.py",
        "head, pull, sums = when(stage == flow.stages - 1, through",
        "head, pull, sums = when(stage >= 0, through",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "embedding at another stage",
        "pipeline_loss.py",
        "first = when(stage == 0, through_first",
        "first = when(stage == 1, through_first",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "embedding at every stage",
        "pipeline_loss.py",
        "first = when(stage == 0, through_first",
        "first = when(stage >= 0, through_first",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "forward embedding elsewhere",
        "pipeline_loss.py",
        "x = when(stage == 0, make, lambda x: x, x)",
        "x = when(stage == 1, make, lambda x: x, x)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "gradients not summed over stages",
        "pipeline_loss.py",
        "sums, first, head = lax.psum((sums, first, head), STAGE)",
        "sums = lax.psum(sums, STAGE)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "sums not summed over stages",
        "pipeline_loss.py",
        "sums, first, head = lax.psum((sums, first, head), STAGE)",
        "first, head = lax.psum((first, head), STAGE)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "sums not summed gpipe",
        "pipeline_loss.py",
        "return lax.psum(sums, STAGE)",
        "return sums",
        TRAINS + "[stage_model-gpipe-0.0-1]",
    ),
    Mutation(
        "last microbatch's gradients alone",
        "pipeline_loss.py",
        "total + part.astype(total.dtype), gradients, more",
        "part.astype(total.dtype), gradients, more",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "pull not scaled",
        "pipeline_loss.py",
        "(leaf * scale).astype(like.dtype)",
        "leaf.astype(like.dtype)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "tied gradients",
        "pipeline_loss.py",
        "return sums, (first, layers, head)",
        "return sums, (head, layers, head)",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "head of gpipe elsewhere",
        "pipeline_loss.py",
        "when(stage == flow.stages - 1, end,",
        "when(stage == 0, end,",
        TRAINS + "[stage_model-gpipe-0.0-1]",
    ),
    Mutation(
        "mean of means",
        "pipeline_loss.py",
        "grow(jnp.asarray(value.total)).sum(), grow(jnp.asarray(value.weight)).sum()",
        "value.total.sum() / value.weight.sum(), jnp.ones_like(value.weight.sum())",
        TRAINS + "[data_stage-1f1b-0.0-1]",
    ),
    Mutation(
        "microbatch not folded",
        "stack.py",
        "fold_leaf(leaf, (number,))",
        "fold_leaf(leaf, (0,))",
        PIPELINE + "dropout_is_another_in_each_microbatch_and_layer",
    ),
    Mutation(
        "one device draws whole",
        "pipeline.py",
        "if stage_microbatches == 1:",
        "if stages == 1:",
        PIPELINE + "dropout_is_another_in_each_microbatch_and_layer",
    ),
    Mutation(
        "one device's number",
        "pipeline.py",
        "run_part(params, part[1], part[0])",
        "run_part(params, part[1], 0)",
        PIPELINE + "dropout_is_another_in_each_microbatch_and_layer",
    ),
    Mutation(
        "number not folded in backward",
        "pipeline_loss.py",
        "y = run.layers(layers, join_x(x_floats), number)",
        "y = run.layers(layers, join_x(x_floats), 0)",
        TRAINS + "[data_stage-1f1b-0.3-2]",
    ),
    Mutation(
        "layers' key in forward",
        "pipeline_loss.py",
        "lambda x: run.layers(floats[1], x, number), lambda x: x, x)\n\n    def tick",
        "lambda x: run.layers(floats[1], x, 0), lambda x: x, x)\n\n    def tick",
        TRAINS + "[data_stage-1f1b-0.3-2]",
    ),
    Mutation(
        "checkpoint in the cond pipeline",
        "pipeline.py",
        "    @jax.checkpoint\n    def run(params",
        "    def run(params",
        PIPELINE + "gpipe_keeps_of_each_microbatch_its_input_and_no_copy_of_the_layers[pipeline]",
    ),
    Mutation(
        "checkpoint in the cond gpipe",
        "pipeline_loss.py",
        "        @jax.checkpoint\n        def forward_or_idle",
        "        def forward_or_idle",
        PIPELINE + "gpipe_keeps_of_each_microbatch_its_input_and_no_copy_of_the_layers[gpipe]",
    ),
    Mutation(
        "forward halves end too early",
        "pipeline_loss.py",
        "anyone = time < count + flow.stages - 1",
        "anyone = time < count",
        PIPELINE + "layers_and_losses_may_move_what_other_axes_split[tokens moved in a layer of four stages]",
    ),
    Mutation(
        "backward halves begin too late",
        "pipeline_loss.py",
        "anyone = time >= flow.stages - 1",
        "anyone = time >= flow.stages",
        PIPELINE + "layers_and_losses_may_move_what_other_axes_split[tokens moved in a layer of four stages]",
    ),
    Mutation(
        "tokens of a ring split over model too",
        "context.py",
        "if size > 1 and model > 1 else ()",
        "if size > 99 else ()",
        CONTEXT + "what_some_devices_skip_holds_no_collective_where_model_splits_tokens_too[fsdp]",
    ),
    Mutation(
        "rows of a padded batch split over experts",
        "expert.py",
        "if not takes_rows_alone():\n        size",
        "if True:\n        size",
        "tests/test_expert.py::test_a_padded_batch_is_mixed_row_by_row",
    ),
    Mutation(
        "a permute over a batch axis under a cond",
        "stack.py",
        'is_alone and "ppermute" not in str(jax.make_jaxpr(do)(*operands))',
        "is_alone",
        PIPELINE + "a_layer_may_permute_over_a_batch_axis_that_is_manual",
    ),
    Mutation(
        "a gradient of rows that are not a stage's own",
        "stack.py",
        "pick(x, lax.stop_gradient(x))",
        "x",
        PIPELINE + "no_stage_adds_what_is_no_number_on_rows_that_are_not_its_own",
    ),
    Mutation(
        "ring under a cond",
        "stack.py",
        'if is_alone and "ppermute" not in str(jax.make_jaxpr(do)(*operands)):',
        "if True:",
        PIPELINE + "islands_stand_inside_the_layers[context-pipeline]",
    ),
    Mutation(
        "weight's gradient",
        "pipeline_loss.py",
        "Weighted(loss.total, lax.stop_gradient(loss.weight))",
        "Weighted(loss.total, loss.weight)",
        PIPELINE + "metrics_and_weights_have_no_gradient_on_any_mesh_and_the_batch_may_need_none[1f1b]",
    ),
    Mutation(
        "metrics' gradient",
        "pipeline_loss.py",
        "lax.stop_gradient(loss.weight)), lax.stop_gradient(metrics)",
        "lax.stop_gradient(loss.weight)), metrics",
        PIPELINE + "metrics_and_weights_have_no_gradient_on_any_mesh_and_the_batch_may_need_none[1f1b]",
    ),
    Mutation(
        "batch's gradient",
        "pipeline_loss.py",
        "    batch = jax.tree.map(_refuse_gradient, batch)\n",
        "",
        PIPELINE + "metrics_and_weights_have_no_gradient_on_any_mesh_and_the_batch_may_need_none[1f1b]",
    ),
    Mutation(
        "captured not told",
        "pipeline_loss.py",
        "        if traced.captured:",
        "        if False:",
        PIPELINE + "what_1f1b_can_not_differentiate_is_named",
    ),
    Mutation(
        "state changes unseen",
        "stack.py",
        "if not isinstance(variable, _MAY_CHANGE) and variable.get_value() is not old[path].get_value():",
        "if False:",
        PIPELINE + "what_can_not_be_is_named_before_any_compile[a layer that changes its own variables]",
    ),
    Mutation(
        "tokens not sent to their experts",
        "expert.py",
        "return lax.all_to_all(_rows_at(rows_MC, sent_DR.ravel()), _AXIS, 0, 0, tiled=True)",
        "return _rows_at(rows_MC, sent_DR.ravel())",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "tokens not sent back from their experts",
        "expert.py",
        "return _rows_at(lax.all_to_all(places_SC, _AXIS, 0, 0, tiled=True), place_M)",
        "return _rows_at(places_SC, place_M)",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "no gradient through the way to the experts",
        "expert.py",
        "(_fetch(fit, grad_SC, routes), None)",
        "(0 * _fetch(fit, grad_SC, routes), None)",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "no gradient through the way back from the experts",
        "expert.py",
        "(_send(fit, grad_MC, routes), None)",
        "(0 * _send(fit, grad_MC, routes), None)",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "ragged: every source writes to the same places",
        "expert.py",
        "first_D = jnp.full(fit.size, index * fit.room, jnp.int32)",
        "first_D = jnp.full(fit.size, 0 * index * fit.room, jnp.int32)",
        EXPERT + "the_ragged_form_of_the_exchange_does_the_same[expert_8]",
    ),
    Mutation(
        "ragged: sizes to send and to take mixed up",
        "expert.py",
        "starts_DD[index], sizes_DD[index], first_D, sizes_DD[:, index])",
        "starts_DD[index], sizes_DD[:, index], first_D, sizes_DD[index])",
        EXPERT + "the_ragged_form_of_the_exchange_does_the_same[expert_8]",
    ),
    Mutation(
        "ragged: rows come back to the owner's starts",
        "expert.py",
        "first_D, sizes_DD[:, index], starts_DD[:, index], sizes_DD[index])",
        "first_D, sizes_DD[:, index], starts_DD[index], sizes_DD[index])",
        EXPERT + "the_ragged_form_of_the_exchange_does_the_same[expert_8]",
    ),
    Mutation(
        "accelerators get the padded exchange",
        "expert.py",
        "return lax.platform_dependent(rows_MC, cpu=dense, default=ragged)",
        "return dense(rows_MC)",
        EXPERT + "accelerators_get_the_ragged_form_twice_each_way[tpu]",
    ),
    Mutation(
        "accelerators get the padded exchange back",
        "expert.py",
        "return lax.platform_dependent(places_SC, cpu=dense, default=ragged)",
        "return dense(places_SC)",
        EXPERT + "accelerators_get_the_ragged_form_twice_each_way[tpu]",
    ),
    Mutation(
        "pairs not sorted by expert",
        "expert.py",
        "order_M = jnp.argsort(experts_M)",
        "order_M = jnp.arange(experts_M.size)",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "rows not sorted by expert where they arrive",
        "expert.py",
        "order_S = jnp.argsort(experts_DR.ravel())",
        "order_S = jnp.arange(experts_DR.size)",
        MIXED + "[expert_4_all_ties]",
    ),
    Mutation(
        "experts' outputs not put back in the order of the tokens",
        "expert.py",
        "mixed_NKC = _take(rows_MC, place_M, order_M)",
        "mixed_NKC = _take(rows_MC, order_M, place_M)",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "rows not put back where they arrived",
        "expert.py",
        "return _take(rows_SC, place_S, order_S)",
        "return rows_SC",
        MIXED + "[expert_4_all_ties]",
    ),
    Mutation(
        "the gates left out", "expert.py", "* gates_NK[..., None]).sum(1)", "/ top_k).sum(1)", MIXED + "[expert_8]"
    ),
    Mutation(
        "gates normalised that are not to be",
        "expert.py",
        "gates_NK = jnp.exp(chosen_NK - jax.nn.logsumexp(logits_NE, axis=-1, keepdims=True))",
        "gates_NK = jax.nn.softmax(chosen_NK)",
        MIXED + "[expert_4_model_2]",
    ),
    Mutation(
        "a token's gradient from its first choice alone",
        "expert.py",
        ".reshape(count, -1, grad.shape[1]).sum(1), None, None",
        ".reshape(count, -1, grad.shape[1])[:, 0], None, None",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "the counts of this source taken for those of all",
        "expert.py",
        "return _Routes(sizes_DD, starts_DD, counts_DDL[:, index], index)",
        "return _Routes(sizes_DD, starts_DD, counts_DDL[index], index)",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "room for one choice of a token at each owner",
        "expert.py",
        "x_NC.shape[0] * min(top_k, num_experts // size)",
        "x_NC.shape[0]",
        MIXED + "[expert_4_all_ties]",
    ),
    Mutation(
        "room for more choices than an owner has experts",
        "expert.py",
        "x_NC.shape[0] * min(top_k, num_experts // size)",
        "x_NC.shape[0] * top_k",
        EXPERT + "tokens_travel_to_their_experts_and_back_in_two_all_to_alls_each_way[{'expert': 4}-3]",
    ),
    Mutation(
        "rows after the last group left as they are",
        "expert.py",
        "return jnp.where(is_row, lax.ragged_dot(rows, kernel + nothing.astype(kernel.dtype), counts), 0)",
        "return lax.ragged_dot(rows, kernel + nothing.astype(kernel.dtype), counts)",
        EXPERT + "what_a_grouped_product_gives_after_the_last_group_spreads_to_no_gradient[expert_8]",
    ),
    Mutation(
        "the parts of the hidden features not summed",
        "expert.py",
        "return lax.reduce_sum(parts, (0,))",
        "return parts[0]",
        MIXED + "[expert_4_model_2]",
    ),
    Mutation(
        "hidden features left to the compiler",
        "expert.py",
        'if axis == "model" and hidden % mesh.shape[axis] == 0',
        'if axis == "none" and hidden % mesh.shape[axis] == 0',
        EXPERT + "hidden_features_split_over_model_cost_one_all_reduce_of_tokens_each_way[{'model': 4}]",
    ),
    Mutation(
        "rows left to the compiler where there are no experts to go to",
        "expert.py",
        "rows = tuple(axis for axis in free if axis in BATCH_AXES)",
        "rows = tuple(axis for axis in free if axis == _AXIS)",
        EXPERT + "without_an_expert_axis_no_token_leaves_its_device",
    ),
    Mutation(
        "the router in a narrow dtype",
        "expert.py",
        "wide = jnp.promote_types(x.dtype, jnp.float32)",
        "wide = x.dtype",
        EXPERT + "narrow_inputs_are_mixed_in_their_dtype_and_routed_in_float32[bfloat16-0.03]",
    ),
    Mutation(
        "the balance without the router's probabilities",
        "expert.py",
        "(fractions_E * jax.nn.softmax(logits).mean(leading)).sum()",
        "(fractions_E * fractions_E).sum()",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "fractions not divided by the choices",
        "expert.py",
        "(math.prod(logits.shape[:-1]) * top_k)",
        "math.prod(logits.shape[:-1])",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "the counts of one shard taken for all",
        "expert.py",
        "_measure(logits, counts.sum(0), top_k)",
        "_measure(logits, counts[0], top_k)",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "the z loss not squared",
        "expert.py",
        "(jax.nn.logsumexp(logits, axis=-1) ** 2).mean()",
        "jax.nn.logsumexp(logits, axis=-1).mean()",
        MIXED + "[expert_8]",
    ),
    Mutation(
        "a step with stages left to the compiler over data",
        "strategy.py",
        'num_microbatches > 1 or self.mesh.shape.get("stage", 1) > 1',
        "num_microbatches > 1",
        PIPELINE + "one_boundary_activation_travels_each_way_and_gradients_are_summed_once",
    ),
    Mutation(
        "1F1B starts no earlier than GPipe",
        "schedule.py",
        'microbatches if name == "gpipe" else min(stages - stage, microbatches)',
        "microbatches",
        "tests/test_schedule.py::test_gpipe_holds_every_microbatch_and_1f1b_no_more_than_the_stages_to_come[4-16]",
    ),
]

ESTIMATION, SAVED, FIT = (
    "tests/test_estimation.py::test_",
    "tests/test_checkpoint.py::test_",
    "tests/test_fit.py::test_",
)
LINKS = ESTIMATION + "a_collective_takes_the_links_of_its_own_axis"
MUTATIONS += [
    Mutation(
        "a ring taken for a line in an estimate",
        "estimation/links.py",
        "torus.rates.link * (2 if is_ring else 1) / stride",
        "torus.rates.link / stride",
        LINKS,
    ),
    Mutation(
        "the traffic of others forgotten in an estimate",
        "estimation/links.py",
        "(2 if is_ring else 1) / stride",
        "(2 if is_ring else 1)",
        LINKS,
    ),
    Mutation(
        "an all-reduce as short as a gather in an estimate",
        "inspection/collectives.py",
        '"all-reduce": 2 * (size - 1) / size,',
        '"all-reduce": (size - 1) / size,',
        LINKS,
    ),
    Mutation(
        "one group of a collective taken for all in an estimate",
        "estimation/links.py",
        "in _lanes_of(torus, groups)]",
        "in _lanes_of(torus, groups[:1])]",
        ESTIMATION + "of_groups_that_lie_differently_the_slowest_counts_and_each_keeps_its_links",
    ),
    Mutation(
        "the busiest link forgotten in an estimate",
        "estimation/links.py",
        "float(carried.max())",
        "float(carried.max() > 0)",
        ESTIMATION + "the_busiest_link_of_a_permute_decides",
    ),
    Mutation(
        "padding not gone through in an estimate",
        "estimation/costs.py",
        "inner * math.ceil(met / made)",
        "inner * max(met // made, 1)",
        ESTIMATION + "a_convolution_is_the_product_that_it_means",
    ),
    Mutation(
        "a slice read whole in an estimate",
        "estimation/costs.py",
        "if place == 0 and one.opcode in _PARTIAL:",
        "if False:",
        ESTIMATION + "a_fusion_moves_what_it_needs",
    ),
    Mutation(
        "a loop's trips forgotten in an estimate",
        "estimation/timeline.py",
        'self._join(self.walk.run(one.attribute("body")), 1 if trips is None else trips)',
        'self._join(self.walk.run(one.attribute("body")), 1)',
        ESTIMATION + "a_loop_takes_as_long_as_its_trips_and_one_of_unknown_trips_is_told",
    ),
    Mutation(
        "the links of a loop forgotten in an estimate",
        "estimation/timeline.py",
        "late = held[link] + taken[link] - seconds",
        "late = 0",
        ESTIMATION + "what_a_loop_sends_waits_for_what_is_under_way_on_its_links",
    ),
    Mutation(
        "the pace of slices forgotten in an estimate",
        "estimation/timeline.py",
        "torus.rates.doubling ** -math.log2(len(slices)) - 1",
        "0",
        ESTIMATION + "what_hosts_exchange_between_slices_is_one_collective_on_the_network",
    ),
    Mutation(
        "devices of a slice counted as those of the mesh",
        "inspection/groups.py",
        "return first[groups] if is_own else groups",
        "return groups",
        ESTIMATION + "of_several_slices_a_program_counts_its_own_devices",
    ),
    Mutation(
        "digests not compared",
        "manifest.py",
        "if digest != told[name][1]:",
        "if False:",
        SAVED + "of_damaged_ones_the_one_before_is_taken_and_named",
    ),
    Mutation(
        "a manifest's own digest not compared",
        "manifest.py",
        'if read.pop("digest", None) != digest:',
        'if read.pop("digest", None) is None:',
        SAVED + "of_damaged_ones_the_one_before_is_taken_and_named",
    ),
    Mutation(
        "a checkpoint's leaves not compared",
        "checkpoint.py",
        'check_leaves(content["leaves"], like, name)',
        "pass",
        SAVED + "a_changed_dtype_or_shape_is_no_silent_cast",
    ),
    Mutation(
        "what Orbax stores not compared",
        "checkpoint.py",
        'check_stored(_orbax().metadata(folder).metadata, content["leaves"], chosen)',
        "pass",
        SAVED + "a_changed_dtype_or_shape_is_no_silent_cast",
    ),
    Mutation(
        "a run that goes on begins its batches anew",
        "source.py",
        "given: Any = batches(self._drawn) if is_function",
        "given: Any = batches(0) if is_function",
        FIT + "a_run_in_two_parts_is_one_run_bit_for_bit[function]",
    ),
    Mutation(
        "an iterator with a state is not set back",
        "source.py",
        "_set_back(iterator, states[jax.process_index()])",
        "pass",
        FIT + "a_run_in_two_parts_is_one_run_bit_for_bit[iterator with a state]",
    ),
    Mutation(
        "a loss that is no number is saved",
        "fit.py",
        "                failed = self._tell_late(state)\n                if failed is None:",
        "                self._tell_late(state)\n                if failed is None:",
        FIT + "a_loss_that_is_no_number_stops_the_run_and_is_not_saved",
    ),
]


class Outcome(NamedTuple):
    mutation: Mutation
    caught: bool
    by: str
    seconds: float


def run_mutation(mutation: Mutation) -> Outcome:
    """Returns whether the mutation's test fails on a copy of the library that has it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for part in ("jaxpar", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        _apply(mutation, copy / "jaxpar" / mutation.file)
        start = time.perf_counter()
        code, text = _run_test(copy, mutation.test)
        seconds = time.perf_counter() - start
    failed = re.findall(r"^FAILED \S+?::(\S+)", text, re.MULTILINE)
    # 1 is a failed test; anything else, such as a test that isn't there, proves nothing.
    if code not in (0, 1) or (code == 1 and not failed):
        raise RuntimeError(f"{mutation.name}: pytest ended with {code}:\n{text[-3000:]}")
    return Outcome(mutation, code == 1, failed[0] if failed else "-", seconds)


def check_unmutated(tests: list[str]) -> None:
    """Raises unless the tests pass on the library as it is."""
    code, text = _run_test(ROOT, *tests)
    if code:
        raise RuntimeError(f"The tests fail without any mutation:\n{text[-3000:]}")


def run_mutations(word: str = "", *, first: int = 0, every: int = 1, workers: int = 2) -> list[Outcome]:
    """Returns the outcome of each (or every so many, from `first` on) whose name holds the word; prints a table."""
    chosen = [mutation for mutation in MUTATIONS if word in mutation.name][first::every]
    check_unmutated(sorted({mutation.test for mutation in chosen}))
    print("| mutation | file | caught by | s |\n|---|---|---|---|")
    outcomes = []
    with ThreadPoolExecutor(workers) as pool:
        for outcome in pool.map(run_mutation, chosen):
            by = outcome.by if outcome.caught else "**nothing**"
            print(f"| {outcome.mutation.name} | {outcome.mutation.file} | {by} | {outcome.seconds:.0f} |", flush=True)
            outcomes.append(outcome)
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    return outcomes


def _apply(mutation: Mutation, path: pathlib.Path) -> None:
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise RuntimeError(
            f"{mutation.name}: {mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times; it must once. "
            "Bring the mutation up to date with the library."
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def _run_test(folder: pathlib.Path, *tests: str) -> tuple[int, str]:
    # The folder comes first on the path, before the installed package: its jaxpar is what is imported.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "--tb=no", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(0 if all(outcome.caught for outcome in run_mutations(*sys.argv[1:2])) else 1)
