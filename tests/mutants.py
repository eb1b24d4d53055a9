"""Tests of the tests: hand-made faults, each of which the suite must catch.

    copy of the tree --one fault--> pytest (the laws) --must fail--> caught

Run as `python -m tests.mutants [--json]`; exit code 1 when a mutant survives.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.paths import CACHE, ROOT

PAGES, GENERATE = "tests/paxattn/test_pages.py", "tests/paxattn/test_generate.py"
SERVING, ENGINE = "tests/paxattn/test_serving.py", "tests/paxattn/test_engine.py"
BEAM, FAN_OUT = "tests/paxattn/test_beam.py", "tests/paxattn/test_fan_out.py"
ATTENTION, SAMPLING = "tests/pallas_kernels/test_paged_attention.py", "tests/paxattn/test_sampling.py"

SPECULATIVE = "tests/paxattn/test_speculative.py"
SMALL = "tests/pallas_kernels/test_small_kernels.py"
BODY = "tests/pallas_kernels/test_mosaic.py::test_the_real_body_interpreted"
PREFILL = "tests/pallas_kernels/test_mosaic_prefill.py"
VERDICT = "tests/paxattn/test_speculative_sampling.py"
SIMULATE, EVICTION, ABLATE = (f"tests/paxattn/test_{name}.py" for name in ("simulate", "eviction", "ablate"))

VIZ, SNAPSHOT = "tests/paxattn/test_viz.py", "tests/models/test_snapshot.py"
ON_MESH = "tests/paxattn/test_on_mesh.py"
MESH = "tests/models/test_mesh.py::test_on_eight_devices[{}]"

PATIENCE = 900
"""Seconds that a mutant's tests may take: several times what the sound ones do."""


class Mutant(NamedTuple):
    """One fault: `old` becomes `new` in `file`, and `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant("hand out NULL", "paxattn/blocks.py", ".at[NULL].set(False)", "", PAGES),
    Mutant("clamp refcounts at zero", "paxattn/blocks.py", "return Blocks(blocks.refcount - references(ids, blocks.refcount.shape[0]))", "return Blocks(jnp.maximum(blocks.refcount - references(ids, blocks.refcount.shape[0]), 0))", PAGES),
    Mutant("allocate in part", "paxattn/blocks.py", "given = wanted & ok", "given = wanted", PAGES),
    Mutant("never copy on write", "paxattn/pages.py", "return writes & ~keeps", "return writes & False", PAGES),
    Mutant("every holder copies", "paxattn/pages.py", "& (last_writer == row)", "& (last_writer < 0)", PAGES),
    Mutant("copy but keep the reference", "paxattn/pages.py", "end, release(blocks, source)", "end, blocks", PAGES),
    Mutant("do not copy the data", "paxattn/cache.py", "copies.count > 0", "copies.count > 99", PAGES),
    Mutant("truncate keeps a block too many", "paxattn/pages.py", "table.pages.shape[1]) < table.pages_for(length)[:, None]\n    blocks", "table.pages.shape[1]) <= table.pages_for(length)[:, None]\n    blocks", PAGES),
    Mutant("fork forgets to release", "paxattn/pages.py", "release(retain(table.blocks, pages), table.pages)", "retain(table.blocks, pages)", PAGES),
    Mutant("a failed append leaves traces", "paxattn/pages.py", "jnp.where(ok, new, old), grown, table)", "new, grown, table)", PAGES),
    Mutant("idle tokens are written", "paxattn/cache.py", "jnp.where(plan.live, plan.block, num_blocks + jnp.arange(plan.block.size))", "jnp.where(plan.live, plan.block, 1)", PAGES),
    Mutant("positions off by one", "paxattn/cache.py", "token - query_start[row] + table.length[row] - count[row]", "token - query_start[row] + table.length[row] - count[row] - 1", PAGES),
    Mutant("V of dead slots is not zeroed", "pallas_kernels/xla.py", "jnp.where(seen.any(axis=1)[:, None, :, None], _gather(v_pool, ids), 0)", "_gather(v_pool, ids)", ATTENTION),
    Mutant("causal mask off by one", "pallas_kernels/xla.py", "seen = at <= position[:, :, None]", "seen = at < position[:, :, None]", ATTENTION),
    Mutant("window off by one", "pallas_kernels/xla.py", "seen &= at > position[:, :, None] - sliding_window", "seen &= at >= position[:, :, None] - sliding_window", ATTENTION),
    Mutant("values from keys", "pallas_kernels/xla.py", "_gather(v_pool, ids), 0)", "_gather(k_pool, ids), 0)", ATTENTION),
    Mutant("no rescaling of the running sum", "pallas_kernels/xla.py", "total * shrink + weight", "total + weight", ATTENTION),
    Mutant("the last chunk is skipped", "pallas_kernels/xla.py", "jax.lax.div(jnp.max(position) + width,", "jax.lax.div(jnp.maximum(jnp.max(position), 1),", ATTENTION),
    Mutant("tiles of a row begin a token apart", "pallas_kernels/tiles.py", "look_up(begin, row) + i * tile)", "look_up(begin, row) + i)", ATTENTION),
    Mutant("an idle token that is a tile looks at keys", "pallas_kernels/tiles.py", "jnp.where(token < query_start[-1], ", "jnp.where(token <= query_start[-1], ", BODY),
    Mutant("each layer works out the angles", "models/layers.py", "jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))", "jnp.cos(angle), jnp.sin(angle)", "tests/models/test_golden.py::test_a_step_of_the_real_model_moves_no_pool_and_is_planned_once"),
    Mutant("finished rows keep their blocks", "paxattn/decoding/step.py", "free(state.cache.table, finish != Finish.RUNNING)", "free(state.cache.table, finish > 999)", GENERATE),
    Mutant("eos is not stopped at", "paxattn/decoding/step.py", "(token[:, None] == state.eos).any(axis=-1), Finish.STOP", "(token[:, None] < state.eos).any(axis=-1) & False, Finish.STOP", GENERATE),
    Mutant("rows pick before their prompt is fed", "paxattn/decoding/step.py", "picks=(count > 0) & (fed.pending == 0)", "picks=count > 0", GENERATE),
    Mutant("decoding rows crowd out prompts", "paxattn/decoding/step.py", "deal(prompts, budget)", "deal(prompts, budget - jnp.sum(singles))", GENERATE),
    Mutant("the plain loop overlooks shared blocks", "paxattn/decoding/step.py", "greedy & jnp.all(self.cache.table.blocks.refcount <= 1)", "greedy", FAN_OUT),
    Mutant("the greedy path overlooks the penalty", "paxattn/decoding/sampling.py", "jnp.all((self.temperature <= 0) & (self.repetition_penalty == 1))", "jnp.all(self.temperature <= 0)", SAMPLING),
    Mutant("NaN rows go on", "paxattn/decoding/step.py", "jnp.where(finite, ended, Finish.NOT_FINITE)", "ended", GENERATE),
    Mutant("noise is shared by rows", "paxattn/decoding/sampling.py", "noise(sampling.key, known)", "noise(jnp.broadcast_to(sampling.key[0], sampling.key.shape), known)", SAMPLING),
    Mutant("top-k keeps one too few", "paxattn/decoding/sampling.py", "k.astype(jnp.float32)", "(k - 1).astype(jnp.float32)", SAMPLING),
    Mutant("the request at the back stays, the front is preempted", "paxattn/serving/service.py", 'ahead = rank < rank[:, None]', 'ahead = rank > rank[:, None]', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("preempted rows keep their blocks", "paxattn/serving/service.py", 'cache = Cache(free(service.cache.table, rows), service.cache.layers)', 'cache = service.cache', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("preemption forgets the answer", "paxattn/serving/service.py", 'preemptions = queue.preemptions.at[', 'queue = dataclasses.replace(queue, known=queue.known.at[jnp.where(rows, service.line, queue.size)].set(1, mode="drop"))\n    preemptions = queue.preemptions.at[', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("nobody is preempted", "paxattn/serving/service.py", 'return jnp.where(stays, count, 0), service.seated & ~stays', 'return count, service.seated & False', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("admission overtakes", "paxattn/serving/service.py", 'fits = waiting & (place < jnp.sum(~seated)) & (promised <= capacity(table))', 'fits = waiting & (place < jnp.sum(~seated)) & (now[order] <= capacity(table))', SERVING + "::test_admission_leaves_the_watermark_free"),
    Mutant("promised blocks are given away", "paxattn/serving/service.py", 'taken = jnp.sum(jnp.where(seated, blocks[service.line], 0))', 'taken = 0', SERVING + "::test_admission_leaves_the_watermark_free"),
    Mutant("the watermark is not kept", "paxattn/serving/service.py", 'promised = total(now) + jnp.minimum(reserve, total(end - now))', 'promised = total(now)', SERVING + "::test_admission_leaves_the_watermark_free"),
    Mutant("requests are admitted before they arrive", "paxattn/serving/service.py", 'self.queue.unfinished & ~on_row & (self.queue.times.arrival <= self.now)', 'self.queue.unfinished & ~on_row', SERVING + "::test_who_sits_where_and_when_is_unobservable"),
    Mutant("a seated request is seated twice", "paxattn/serving/service.py", 'self.queue.unfinished & ~on_row &', 'self.queue.unfinished &', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("ended requests keep their row", "paxattn/serving/service.py", 'line=jnp.where(state.running, service.line, queue.size)', 'line=service.line', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("prompts crowd out decoding rows", "paxattn/serving/service.py", 'count = singles + jnp.clip(budget - jnp.sum(singles) - before(prompts), 0, prompts)', 'count = jnp.clip(budget - before(pending), 0, pending)', SERVING + "::test_decoding_rows_feed_first_then_prompts_in_order"),
    Mutant("idle time is waited out", "paxattn/serving/service.py", 'jnp.where(idle, jnp.maximum(service.now, arrival), service.now)', 'service.now', SERVING + "::test_all_end_in_one_iteration_and_idle_time_is_skipped"),
    Mutant("a row reads its own line", "paxattn/decoding/step.py", 'state.tokens[state.line[plan.row], plan.position]', 'state.tokens[plan.row, plan.position]', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("cancelled requests keep their row", "paxattn/serving/service.py", 'rows = lines[service.line] & service.seated', 'rows = service.seated & False', ENGINE + "::test_cancel_anywhere"),
    Mutant("a stream asks too late whose answer it is", "paxattn/serving/engine.py", "if len(answer.token_ids) == sent and self._waits(answer):\n                self.step()", "if len(answer.token_ids) == sent:\n                self.step()\n                if answer not in self._unfinished:\n                    raise ValueError", ENGINE + "::test_a_stream_ends_when_its_answer_is_cancelled_while_a_chunk_runs"),
    Mutant("a note is lost in a turn", "paxattn/serving/engine.py", "        with self._notes:\n            leaving, self._leaving = self._leaving, {}", "        if True:\n            leaving, self._leaving = self._leaving, {}", ENGINE + "::test_what_a_thread_notes_is_not_lost_in_a_turn"),
    Mutant("who cancelled keeps a line", "paxattn/serving/engine.py", "        if finish != Finish.RUNNING:\n            self._lines[line] = None", "        if finish != Finish.RUNNING and answer.finish_reason is None:\n            self._lines[line] = None", ENGINE + "::test_a_line_is_free_once_the_device_ended_it"),
    Mutant("a watcher that raises silences the others", "paxattn/serving/engine.py", "                calls.callback(self._tell, answer)", "                self._tell(answer)", ENGINE + "::test_who_watches_and_raises_does_not_keep_others_from_being_told"),
    Mutant("who watches is told an end twice", "paxattn/serving/engine.py", "watch = self._watch.pop(answer, None)", "watch = self._watch.get(answer)", ENGINE + "::test_who_watches_is_told_the_end_once_and_is_forgotten"),
    Mutant("a request's number is not in its key", "paxattn/serving/chunk.py", "jax.random.fold_in(key, ticket[0])", "jax.random.fold_in(key, line[0])", ENGINE + "::test_without_a_key_a_request_samples_with_its_number"),
    Mutant("the penalty looks at another line", "paxattn/decoding/sampling.py", 'tokens if line is None else tokens[line]', 'tokens[: logits.shape[0]]', SERVING + "::test_the_oldest_request_is_never_preempted_and_moves_in_every_step"),
    Mutant("a narrow token axis drops rows", "paxattn/serving/widths.py", "jnp.sum(need <= jnp.array(widths))", "jnp.sum(need <= 2 * jnp.array(widths))", SERVING),
    Mutant("a prompt takes the longest axis", "paxattn/serving/loop.py", "jnp.any(count > 1), shortest(fed, mixed)", "jnp.any(count > 1), 0", SERVING + "::test_the_width_of_the_token_axis_is_unobservable"),
    Mutant("an axis is taken that is hardly used", "paxattn/serving/widths.py", "half_used = 2 * need > lengths[fits]", "half_used = need > 0", SERVING + "::test_an_axis_is_half_used_or_the_shortest"),
    Mutant("rows that pick get each other's tokens", "paxattn/decoding/step.py", ".at[of].set(x, mode=\"drop\"), found)", ".at[of - of[0]].set(x, mode=\"drop\"), found)", GENERATE),
    Mutant("a penalty alone counts as greedy", "paxattn/decoding/sampling.py", "numbers[0] <= 0 and numbers[1] == 1", "numbers[0] <= 0", SAMPLING),
    Mutant("samples of a prompt share a key", "paxattn/decoding/sampling.py", "jnp.where(jnp.arange(n) > 0, folded, key[:, None])", "jnp.where(jnp.arange(n) > n, folded, key[:, None])", FAN_OUT),
    Mutant("followers feed the prompt too", "paxattn/decoding/fan_out.py", "jnp.where(row == leader, state.pending, 0)", "state.pending", FAN_OUT),
    Mutant("a group forks from a neighbour", "paxattn/decoding/fan_out.py", "fork(state.cache.table, leader)", "fork(state.cache.table, (leader + group) % row.size)", FAN_OUT),
    Mutant("shared blocks are not counted once", "paxattn/sharing.py", "table.blocks.num_used", "jnp.sum(table.blocks.refcount)", FAN_OUT),
    Mutant("the pool is a block too small", "paxattn/decoding/generate.py", "-(-new // block_size) + 1", "-(-new // block_size) - 1", BEAM),
    Mutant("beams keep their own cache", "paxattn/decoding/expand.py", "jnp.take_along_axis(parent, at, axis=1), -1)", "jnp.arange(prompts * k).reshape(prompts, k), -1)", BEAM),
    Mutant("finished prompts keep their beams", "paxattn/decoding/expand.py", "axis=1), -1)  # no parent", "axis=1), jnp.arange(prompts * k).reshape(prompts, k))  # no parent", BEAM),
    Mutant("hypotheses that end go on", "paxattn/decoding/expand.py", "jnp.where(has_ended, candidates.score + NEVER, candidates.score)", "candidates.score", BEAM),
    Mutant("scores are not divided by length", "paxattn/decoding/expand.py", "new.astype(jnp.float32) ** search.length_penalty, NEVER", "1.0, NEVER", BEAM),
    Mutant("the first step starts from all beams", "paxattn/decoding/beam.py", "jnp.where(jnp.arange(num_beams) == 0, 0.0, NEVER)", "jnp.zeros(num_beams)", BEAM),
    Mutant("a failed step keeps hypotheses", "paxattn/decoding/expand.py", "has_ended & alive[:, None]", "has_ended", BEAM),
    Mutant("sick beams go on", "paxattn/decoding/expand.py", "running & ~sick", "running", BEAM),
    Mutant("chunks of top-k out of order", "paxattn/decoding/expand.py", "jnp.sort(jax.lax.top_k(chunks.max(axis=2), k)[1], axis=1)", "jax.lax.top_k(chunks.max(axis=2), k)[1]", BEAM),
    Mutant("early stopping is ignored", "paxattn/decoding/expand.py", "(search.early_stopping is True)", "False", BEAM),
    Mutant("a place for each candidate that ends", "paxattn/decoding/expand.py", "has_ended & (jnp.arange(has_ended.shape[1]) < k)", "has_ended", BEAM),
    Mutant("never is like False", "paxattn/decoding/expand.py", '(search.early_stopping == "never")', "False", BEAM),
    Mutant("speculation: rejected tokens stay in the cache", "paxattn/decoding/speculative.py", "jnp.where(after.running, after.known - 1, 0)", "jnp.where(after.running, cache.table.length, 0)", SPECULATIVE),
    Mutant("speculation: one token too many is rolled back", "paxattn/decoding/speculative.py", "jnp.where(after.running, after.known - 1, 0)", "jnp.where(after.running, after.known - 2, 0)", SPECULATIVE),
    Mutant("speculation: the draft's cache is not rolled back", "paxattn/decoding/drafters.py", "truncate(carry.table, jnp.where(state.running, state.known - 1, 0))", "truncate(carry.table, jnp.where(state.running, 9999, 0))", SPECULATIVE),
    Mutant("speculation: the draft reads the token it should go on from", "paxattn/decoding/drafters.py", "jnp.maximum(behind(cache) - 1, 0)", "behind(cache)", SPECULATIVE),
    Mutant("speculation: finished rows keep the draft's blocks", "paxattn/decoding/drafters.py", "jnp.where(state.running, state.known - 1, 0))", "state.known - 1)", SPECULATIVE),
    Mutant("speculation: eos inside a run is passed over", "paxattn/decoding/speculative.py", "_before(agrees & ~ends)", "_before(agrees)", SPECULATIVE),
    Mutant("speculation: no bonus where all held", "paxattn/decoding/speculative.py", "picks[:, None] & _before(", "picks[:, None] & (place < jnp.maximum(count[:, None] - 1, 1)) & _before(", SPECULATIVE),
    Mutant("speculation: guesses go on after a wrong one", "paxattn/decoding/speculative.py", "jnp.cumprod(held[:, :-1], axis=1)", "held[:, :-1]", SPECULATIVE),
    Mutant("speculation: the limit is overrun", "paxattn/decoding/speculative.py", "jnp.minimum(1 + guessed, limit - state.known)", "1 + guessed", SPECULATIVE),
    Mutant("speculation: the pool does not shorten guesses", "paxattn/decoding/speculative.py", "fits.sum(axis=-1, dtype=jnp.int32))", "k + 1)", SPECULATIVE),
    Mutant("speculation: fast rows starve slow ones", "paxattn/decoding/speculative.py", "jnp.minimum(state.origin + ahead[..., None], limit) - 1", "jnp.minimum(state.known + 1 + jnp.arange(k + 1)[:, None] + 0 * ahead[..., None], limit) - 1", SPECULATIVE),
    Mutant("speculation: tokens with NaN scores are kept", "paxattn/decoding/speculative.py", "kept = due & finite & _before(finite)", "kept = due", SPECULATIVE),
    Mutant("speculation: a guess of NaN ends the row", "paxattn/decoding/speculative.py", "sick & (count == 1)", "sick", SPECULATIVE),
    Mutant("speculation: scores of the wrong place", "paxattn/decoding/speculative.py", "jnp.minimum(place, jnp.maximum(count[:, None] - 1, 0))", "jnp.minimum(place + 1, jnp.maximum(count[:, None] - 1, 0))", SPECULATIVE),
    Mutant("speculation: the penalty does not see the guess", "paxattn/decoding/speculative.py", "take(logits, state.sampling, tokens, at,", "take(logits, state.sampling, state.tokens, at,", VERDICT),
    Mutant("speculation: u is compared with p, not p / q", "paxattn/decoding/rejection.py", "u * _chosen(q, guess) < _chosen(p, guess)", "u < _chosen(p, guess)", VERDICT),
    Mutant("speculation: a rejected place draws from p", "paxattn/decoding/rejection.py", "jnp.maximum(p - q, 0)", "jnp.maximum(p, 0)", VERDICT),
    Mutant("speculation: the verdict has the draft's noise", "paxattn/decoding/rejection.py", "stream(each, ACCEPT)", "stream(each, DRAFT)", VERDICT),
    Mutant("speculation: guesses have the noise of tokens", "paxattn/decoding/drafters.py", "else stream(state.sampling, DRAFT)", "else state.sampling", VERDICT),
    Mutant("ablate: simulated rows never end", "paxattn/simulate.py", "picks & (known >= state.limit)", "picks & (known > state.limit)", SIMULATE + "::test_the_trace_is_that_of_serving"),
    Mutant("ablate: simulated rows keep their blocks", "paxattn/simulate.py", "left = free(table, finish != Finish.RUNNING)", "left = table", SIMULATE + "::test_the_trace_is_that_of_serving"),
    Mutant("ablate: reservations overtake the pool", "paxattn/simulate.py", 'side="right") - 1 - first', 'side="right") - first', SIMULATE + "::test_reserved_memory_is_the_rule_with_lists"),
    Mutant("ablate: branches never part", "paxattn/simulate.py", "parents[(at - 1) % parents.shape[0]], row)", "row, row)", SIMULATE + "::test_branches_share_what_arithmetic_says"),
    Mutant("ablate: a shared token counts twice", "paxattn/ablation/runs.py", "np.maximum.at(filled", "np.add.at(filled", ABLATE + "::test_live_slots_count_a_shared_token_once"),
    Mutant("ablate: other tokens pass", "paxattn/ablation/sweep.py", 'row["tokens_sha256"] == want and', 'want and', ABLATE + "::test_other_tokens_are_noticed"),
    Mutant("ablate: another subject's rows are taken", "paxattn/ablation/sweep.py", 'known[config] = {"subject": fingerprint(member, config), ', 'known[config] = {', ABLATE + "::test_a_file_is_taken_up_where_it_stopped"),
    Mutant("ablate: sizes do not reach the kernel", "pallas_kernels/api.py", '**({"sizes": sizes} if sizes else {}),', "", ABLATE + "::test_every_size_of_a_kernel_can_be_swept"),
    Mutant("ablate: sizes are one attention to a traced layer", "paxattn/ablation/cases.py", "attention=with_sizes(run.attention, **sizes)", 'attention="mosaic"', ABLATE + "::test_every_size_of_a_kernel_can_be_swept"),
    Mutant("edge: a count overflows", "paxattn/pages.py", "jnp.any(count > table.capacity - table.length)", "jnp.any(end > table.capacity)", "tests/paxattn/test_edges.py::test_counts_that_overflow_are_refused_bit_for_bit"),
    Mutant("edge: guesses take the blocks of shared tails", "paxattn/decoding/speculative.py", "axis=-1) + copies <= table", "axis=-1) <= table", "tests/paxattn/test_edges.py::test_tails_that_are_shared_are_copied_before_guesses_take_the_blocks"),
    Mutant("edge: scores keep the model's dtype", "paxattn/decoding/model.py", "values.astype(jnp.float32)", "values", "tests/paxattn/test_edges.py::test_scores_of_half_the_bits_are_decided_in_float32"),
    Mutant("edge: a shared prompt is not evicted", "paxattn/decoding/fan_out.py", "state if evict is None else evicted(state, evict)", "state", "tests/paxattn/test_edges.py::test_several_samples_are_evicted_while_their_prompt_is_fed"),
    Mutant("edge: a full row ends all", "paxattn/decoding/step.py", "jnp.where(full, Finish.LENGTH, Finish.RUNNING)", "Finish.LENGTH", "tests/paxattn/test_edges.py::test_a_step_that_cannot_be_fed_says_why"),
    Mutant("edge: a traced limit runs past the row", "paxattn/decoding/generate.py", "jnp.minimum(jnp.asarray(max_new_tokens, jnp.int32), max_model_len - prompt_length)", "jnp.asarray(max_new_tokens, jnp.int32)", "tests/paxattn/test_edges.py::test_a_traced_limit_ends_where_the_row_does"),
    Mutant("a sum of lengths overflows", "paxattn/decoding/generate.py", "lengths.astype(np.int64) + np", "lengths + np", "tests/paxattn/test_edges.py::test_more_tokens_than_an_integer_holds_are_refused"),
    Mutant("a name means its first function", "pallas_kernels/api.py", "            jax.clear_caches()", "            pass", "tests/pallas_kernels/test_paged_attention.py::test_a_name_means_its_latest_function"),
    Mutant("a power of two is reserved that never fits", "paxattn/ablation/pool.py", "int(reservation(whole, run).max())", "longest", "tests/paxattn/test_ablate.py::test_lengths_fit_every_pool_before_any_is_measured"),
    Mutant("a share begins a tile late", "pallas_kernels/schedule.py", "rest - head * cost[inside] - item_tiles, 0)", "rest - head * cost[inside], 0)", "tests/pallas_kernels/test_schedule.py"),
    Mutant("an item costs no more than its tiles", "pallas_kernels/schedule.py", "jnp.maximum(count + item_tiles, 1)", "jnp.maximum(count, 1)", "tests/pallas_kernels/test_schedule.py"),
    Mutant("a copy is a size too small", "pallas_kernels/decode_memory.py", "(live <= size)", "(live <= size + 8)", BODY),
    Mutant("queries of a decode tile come as they are", "pallas_kernels/decode.py", "if interpret or used > 8 else", "if interpret else", "tests/pallas_kernels/test_mosaic.py::test_lowers_for_an_h100"),
    Mutant("the signal beside the last values comes early", "pallas_kernels/prefill_memory.py", "_free_slot(refs.kv_free, done, call.config.stages)", "call.slot(done)", PREFILL + "::test_whichever_copies_are_late"),
    Mutant("prefill multiplies values that are nobody's", "pallas_kernels/prefill_compute.py", "mine=wg == 0", "mine=wg == 2", PREFILL + "::test_equals_the_reference"),
    Mutant("decode multiplies the value after a row's last", "pallas_kernels/decode_compute.py", "dead_to, last + 1)", "dead_to, last + 2)", BODY),
    Mutant("decode multiplies a value behind the window", "pallas_kernels/decode_compute.py", "first - call.sliding_window + 1", "first - call.sliding_window", BODY),
    Mutant("prefill multiplies a value behind the window", "pallas_kernels/prefill_plan.py", "length - count - sliding_window + 1", "length - count - sliding_window", PREFILL + "::test_equals_the_reference"),
    Mutant("dead values of the first columns alone are zeroed", "pallas_kernels/zero_dead.py", "range(0, columns, 64)", "range(0, 64, 64)", BODY),
    Mutant("dead values of the first rows alone are zeroed", "pallas_kernels/zero_dead.py", "range(0, rows, 64)", "range(0, 64, 64)", BODY),
    Mutant("prefill: a thread's part of a sum keeps its old scale", "pallas_kernels/prefill_compute.py", "total * lax.broadcast_in_dim(shrink, total.shape, [0]) + _fold(p)", "total + _fold(p)", PREFILL + "::test_equals_the_reference"),
    Mutant("prefill: a tile of the diagonal is seen whole", "pallas_kernels/prefill_compute.py", "lax.div(position + low + 1, kv)", "lax.div(position + high + kv, kv)", PREFILL + "::test_equals_the_reference"),
    Mutant("assemble: serialized products are not seen", "pallas_kernels/assemble.py", "(case, kernel) in serial", "False", "tests/pallas_kernels/test_assemble.py"),
    Mutant("ablate: another config is the same model", "paxattn/ablation/fingerprint.py", "[repr(config), ", "[", ABLATE + "::test_a_config_that_changes_no_array_is_another_model"),
    Mutant("ablate: a model's own config does not count", "paxattn/ablation/fingerprint.py", 'repr(getattr(model, "config", None))', '""', ABLATE + "::test_a_config_outside_the_tree_counts"),
    Mutant("ablate: a model's structure does not count", "paxattn/ablation/fingerprint.py", "str(tree), ", "", ABLATE + "::test_subjects_are_told_apart"),
    Mutant("ablate: the place of a number does not count", "paxattn/checksum.py", "jnp.sum(bits * place, dtype=jnp.uint32)", "jnp.sum(bits, dtype=jnp.uint32)", ABLATE + "::test_subjects_are_told_apart"),
    Mutant("ablate: a packed model is another", "paxattn/ablation/fingerprint.py", "subject.whole if isinstance(subject, Packed) else subject", "subject", ABLATE + "::test_a_model_with_anothers_arrays_is_another"),
    Mutant("ablate: rows without a kernel are taken", "paxattn/ablation/sweep.py", 'row is None or (query_heads is not None and row.get("kernel_us") is None)', "row is None", ABLATE + "::test_a_kernel_that_was_not_timed_is_measured_again"),
    Mutant("ablate: functions of one name share a row", "paxattn/ablation/cases.py", "if (told := tuple(asked.items())) in labels:", "if (told := tuple(asked.items())) in ():", ABLATE + "::test_wrong_questions_are_refused"),
    Mutant("ablate: digests are numbers", "paxattn/ablation/table.py", "cell if name in TEXT and cell else _parsed(cell)", "_parsed(cell)", ABLATE + "::test_digests_stay_text"),
    Mutant("ablate: lengths are checked pool by pool", "paxattn/ablation/sweep.py", "        pool.check_lengths(subject, case.run)", "        pass", ABLATE + "::test_lengths_fit_every_pool_before_any_is_measured"),
    Mutant("the decode kernel forgets its sizes", "pallas_kernels/mosaic.py", "resized(best, sizes)", "best", "tests/pallas_kernels/test_mosaic.py::test_sizes_stand_in_the_name"),
    Mutant("the prefill kernel forgets its sizes", "pallas_kernels/mosaic.py", "resized(prefill_config(q.shape[2]), sizes)", "prefill_config(q.shape[2])", "tests/pallas_kernels/test_mosaic.py::test_sizes_stand_in_the_name"),
    Mutant("sizes of both kernels are one", "pallas_kernels/config.py", "name: sizes[size] for name, size in named.items() if size in sizes", "name: sizes[name] for name, size in named.items() if name in sizes", "tests/pallas_kernels/test_mosaic.py::test_sizes_stand_in_the_name"),
    Mutant("speculation guesses before the prompt is fed", "paxattn/decoding/step.py", "jnp.any(s.pending > 1), feed, state)", "jnp.any(s.pending > 2), feed, state)", SPECULATIVE),
    Mutant("processes may have different models", "models/hosts.py", "if mine.get(name) != theirs.get(name)", "if False", "tests/models/test_mesh.py::test_in_two_processes"),
    Mutant("evict: attention sees the hole", "paxattn/decoding/eviction.py", "length=plan.length - gone * block_size", "length=plan.length", EVICTION),
    Mutant("evict: the window is one block short", "paxattn/decoding/eviction.py", "<= table.length[:, None] - self.window + 1", "<= table.length[:, None] - self.window + 5", EVICTION + "::test_sinks_and_window_hold_what_they_say"),
    Mutant("evict: blocks are not released", "paxattn/decoding/eviction.py", "release(table.blocks, jnp.where(out, table.pages, NULL))", "table.blocks", EVICTION),
    Mutant("evict: serving charges rows for evicted pages", "paxattn/serving/service.py", "table.pages_for(table.length + count) - gone", "table.pages_for(table.length + count)", EVICTION + "::test_serving_in_a_pool_of_the_longest_request"),
    Mutant("evict: serving counts evicted pages as room", "paxattn/serving/service.py", "capacity(table) - jnp.sum(gone)", "capacity(table)", EVICTION + "::test_a_preempted_row_gives_back_what_it_still_holds"),
    Mutant("evict: a preempted row counts its holes as freed", "paxattn/serving/service.py", "rows[:, None] & (service.cache.table.pages != NULL)", "jnp.where(rows, service.cache.table.pages_for(service.cache.table.length), 0)", EVICTION + "::test_a_preempted_row_gives_back_what_it_still_holds"),
    Mutant("evict: attention of serving sees the hole", "paxattn/serving/loop.py", "model if evict is None else Forgetful(model)", "model", EVICTION + "::test_serving_everybody_at_once_is_generating"),
    Mutant("evict: the engine forgets to", "paxattn/serving/chunk.py", "attention=attention, evict=evict)", "attention=attention)", "tests/models/test_lm.py::test_eviction_by_name_or_object_in_batches_and_through_the_engine"),
    Mutant("evict: evicted pages look shared", "paxattn/sharing.py", "jnp.sum(table.blocks.refcount, dtype=jnp.int32)", "jnp.sum(table.pages_for(table.length), dtype=jnp.int32)", EVICTION + "::test_attention_sees_what_a_row_still_holds"),
    Mutant("evict: a page that fills may go", "paxattn/decoding/eviction.py", "jnp.where(full & (table.pages != NULL)", "jnp.where((table.pages != NULL)", EVICTION + "::test_a_shared_block_stays_with_its_other_holders"),
    Mutant("mesh: tokens of a slice count from zero", "paxattn/decoding/vocabulary.py", "(mine.token + offset(scores))", "mine.token", MESH.format("generate (1, 8)")),
    Mutant("mesh: pools lie whole in shapes", "paxattn/mesh.py", "_POOL if isinstance(node, KV) else _REST if", "_REST if isinstance(node, KV) else _REST if", MESH.format("ahead")),
    Mutant("mesh: a group of one sums up", "paxattn/mesh.py", "if jax.lax.axis_size(MODEL) == 1:", "if jax.lax.axis_size(MODEL) == 0:", MESH.format("ahead")),
    Mutant("mesh: sums of slices are not rescaled", "paxattn/decoding/vocabulary.py", "jnp.sum(totals * jnp.exp(tops - top), axis=0)", "jnp.sum(totals, axis=0)", MESH.format("beams (2, 4)")),
    Mutant("mesh: candidates of a slice count from zero", "paxattn/decoding/vocabulary.py", "token + offset(scores), logprob", "token, logprob", MESH.format("beams (2, 4)")),
    Mutant("mesh: greedy gathers the logits", "paxattn/decoding/sampling.py", "token, score = found.token, found.top", "token, score = peak(whole(logits)).token, found.top", MESH.format("collectives")),
    Mutant("mesh: the embedding's slice starts at zero", "models/layers.py", "tokens - jax.lax.axis_index(axis) * embed.shape[0]", "tokens", MESH.format("generate (1, 8)")),
    Mutant("mesh: a bias on every device", "models/llama.py", "return (out + self.out_bias[...] if config.attention_bias else out), kv", "return (out + total(self.out_bias[...], self.axis) if config.attention_bias else out), kv", MESH.format("biases")),
    Mutant("mesh: repeated heads out of order", "models/sharding.py", "jnp.repeat(qkv[..., -2:, :], times, axis=-3)", "jnp.concatenate([qkv[..., -2:, :]] * times, axis=-3)", MESH.format("generate (1, 8)")),
    Mutant("mesh: repeated heads of a file out of order", "models/load.py", "np.repeat(k, times, axis=0)", "np.concatenate([k] * times)", MESH.format("files")),
    Mutant("mesh: a packed model is whole everywhere", "paxattn/mesh.py", "node.whole if isinstance(node, Packed) else node", "node", ON_MESH),
    Mutant("mesh: prompts with a name are not dealt", "paxattn/mesh.py", "if name in _ROWS}", "if name in _ROWS and name not in options}", ON_MESH),
    Mutant("mesh: keys follow the hand", "paxattn/mesh.py", "(key, jnp.arange(count))", "(key, jnp.arange(count) // 2)", MESH.format("sampling (2, 4)")),
    Mutant("mesh: answers in the order of the hands", "paxattn/mesh.py", "*x.shape[2:]).swapaxes(0, 1)", "*x.shape[2:])", MESH.format("generate (2, 4)")),
    Mutant("an idle token's key is written", "pallas_kernels/rope.py", "live = token < query_start_ref[query_start.size - 1]", "live = token >= 0", SMALL),
    Mutant("a key is written without its turn", "pallas_kernels/rope.py", "k_pool[block, kv_head, slot, :] = apply_rope(qkv[token, kv_head, group, :], angles)", "k_pool[block, kv_head, slot, :] = qkv[token, kv_head, group, :]", SMALL),
    Mutant("a kernel for few rows is given many", "pallas_kernels/few_rows.py", "if x.shape[0] <= rows), 0)", "), 0)", SMALL),
    Mutant("a gate lets all through", "pallas_kernels/few_rows.py", "jax.nn.silu(sums[0]) * sums[1]", "sums[1]", SMALL),
    Mutant("a name of XLA's means a row's product of ours", "models/layers.py", "if mosaic.chosen(attention) and few_rows.fits(x, w):\n        return few_rows.few_rows(x, w)\n", "if few_rows.fits(x, w):\n        return few_rows.few_rows(x, w)\n", SMALL),
    Mutant("a norm over the filled-up row", "pallas_kernels/add_norm.py", "jnp.sum(wide * wide) / embed", "jnp.sum(wide * wide) / width", SMALL),
    Mutant("the norm of x alone", "pallas_kernels/add_norm.py", "wide = total.astype(jnp.float32)", "wide = load(x_ref, token).astype(jnp.float32)", SMALL),
    Mutant("a copy to NULL", "pallas_kernels/copy_blocks.py", "@pl.when(there != null)", "@pl.when(there >= null)", SMALL),
    Mutant("the last pools are not copied", "pallas_kernels/copy_blocks.py", "for i in range(0, len(pool_refs), AT_ONCE)", "for i in range(0, AT_ONCE, AT_ONCE)", SMALL),
    Mutant("asked for xla, small kernels run", "pallas_kernels/mosaic.py", 'return implementation.partition("(")[0] in ("auto", "mosaic") and on_hopper()', "return on_hopper()", SMALL),
    Mutant("angles are forgotten", "paxattn/attention.py", "if angles is None:", "if True:", SMALL),
    Mutant("pictures: shared blocks look private", "paxattn/viz/pages.py", "if first[block] != last[block]:\n                corners", "if False:\n                corners", VIZ),
    Mutant("pictures: a block too many is free", "paxattn/viz/pages.py", "elif count == 0:", "elif count <= 1:", VIZ),
    Mutant("pictures: forks of held blocks are not seen", "paxattn/viz/recording.py", "gained & ~fresh & ~_held_before(old, new)", "gained & ~fresh & fresh_block[new.pages]", VIZ),
    Mutant("pictures: a copy counts as a new page", "paxattn/viz/recording.py", "(fresh & ~copied | passing)[phase == Phase.PREFILL]", "(fresh | passing)[phase != Phase.IDLE]", VIZ),
    Mutant("pictures: preempted requests have ended", "paxattn/viz/recording.py", "bool(on) and line in new.waiting", "bool(on) and line not in new.waiting", VIZ),
    Mutant("pictures: rollback is not returned", "paxattn/viz/flow.py", 'total("freed") - back - died', 'total("freed") - died', VIZ),
    Mutant("pictures: beams that died return nothing", "paxattn/viz/flow.py", 'died = dropped if total("joined") and not preempted else 0', "died = 0", VIZ),
    Mutant("pictures: holes are drawn as block 0", "paxattn/viz/pages.py", "_runs(holes[row, : count[row]])", "_runs(holes[row, : count[row]] & False)", VIZ),
    Mutant("pictures: what was evicted counts as held", "paxattn/viz/pages.py", "held = length - int(holes.sum()) * block_size", "held = length", VIZ),
    Mutant("pictures: evicted blocks are given back by rows that ended", "paxattn/viz/flow.py", "- back - died - lost - evicted", "- back - died - lost", VIZ),
    Mutant("pictures: a fork evicts its parent's holes", "paxattn/viz/recording.py", "& ~(old.holes & ~came) & ~joined[:, None]", "& ~(old.holes & ~came)", VIZ),
    Mutant("pictures: pages that come and go in a step were never there", "paxattn/viz/recording.py", "passing = holes & ~let_go &", "passing = holes & False &", VIZ),
    Mutant("pictures: prompts whose row ends at once take nothing", "paxattn/viz/recording.py", ".sum() + last.sum())", ".sum())", VIZ),
    Mutant("pictures: a copy that is let go in its step is nobody's", "paxattn/viz/recording.py", "if holes.any() and not ended.any():", "if False:", VIZ),
    Mutant("pictures: blocks taken from a preempted request are not fresh", "paxattn/viz/recording.py", "((old.refcount == 0) | lost) & (new", "(old.refcount == 0) & (new", VIZ),
    Mutant("pictures: what a preempted request held and another took was not returned", "paxattn/viz/recording.py", "(new.refcount == 0) | lost", "(new.refcount == 0)", VIZ),
    Mutant("pictures: a film of two batches", "models/watch.py", 'if options.setdefault("max_num_seqs", rows) < rows:', 'if options.get("max_num_seqs", rows) < 0:', "tests/models/test_cli.py::test_whoever_is_watched_sits_in_one_batch"),
    Mutant("pictures: guesses are fed in prefill", "paxattn/viz/recording.py", "np.where(guessing, Phase.SPECULATIVE, phase)", "phase", VIZ),
    Mutant("pictures: a file knows no dark theme", "paxattn/viz/picture.py", "prefers-color-scheme:dark", "min-width:1px", VIZ),
    Mutant("verify steps: copies are not counted", "paxattn/decoding/step.py", "blocks_copied=stats.blocks_copied + copied", "blocks_copied=stats.blocks_copied", "tests/paxattn/test_viz.py"),
    Mutant("mesh: a request enters every shard", "paxattn/serving/chunk.py", "line % shards == jnp.arange(shards)[:, None]", "jnp.arange(shards)[:, None] >= 0", MESH.format("engine (2, 2)")),
    Mutant("mesh: what fills up a hand is fed", "paxattn/mesh.py", "jnp.where(at < length.size, length[np.minimum(at, length.size - 1)], 0)", "length[np.minimum(at, length.size - 1)]", MESH.format("samples (2, 2)")),
    Mutant("mesh: another shard's request is cancelled", "paxattn/serving/chunk.py", "deal(lines, shards)", "lines.reshape(shards, -1)", MESH.format("engine (2, 2)")),
    Mutant("snapshot: repeated heads out of order", "models/recut.py", "jnp.arange(heads) * x.shape[-3] // heads", "jnp.arange(heads) % x.shape[-3]", MESH.format("snapshots")),
    Mutant("snapshot: a model cut otherwise is another", "models/snapshot.py", "times = heads // config.num_key_value_heads", "times = 1", MESH.format("snapshots")),
    Mutant("snapshot: pools go to any number of data shards", "models/recut.py", "if shards != (self.saved.data or 1):", "if False:", MESH.format("snapshots")),
    Mutant("snapshot: any pool is cut like the model's", "models/recut.py", "if isinstance(self.model, Cut) and saved == self.saved.kv_heads:", "if saved == self.saved.kv_heads:", MESH.format("snapshots")),
    Mutant("snapshot: keys lose their kind", "models/snapshot.py", "jax.random.wrap_key_data(_rebuild(data, arrays), impl=impl)", "jax.random.wrap_key_data(_rebuild(data, arrays))", SNAPSHOT),
    Mutant("snapshot: any model will do", "models/snapshot.py", 'if config["model"] != fingerprint(model):', "if False:", SNAPSHOT),
    Mutant("snapshot: the order of parameters does not count", "paxattn/checksum.py", "jnp.sum(bits * place, dtype=jnp.uint32)", "jnp.sum(bits, dtype=jnp.uint32)", SNAPSHOT),
    Mutant("snapshot: static fields are forgotten", "models/snapshot.py", "k: v if known[k] else _rebuild(v, arrays)", "k: 1 if known[k] else _rebuild(v, arrays)", SNAPSHOT),
    Mutant("snapshot: named tuples are taken for tuples", "models/snapshot.py", "if type(node) in (tuple, list):", "if isinstance(node, tuple | list):", SNAPSHOT),
    Mutant("snapshot: any key of a dict will do", "models/snapshot.py", "if odd := [key for key in node if type(key) is not str]:", "if odd := []:", SNAPSHOT),
    Mutant("snapshot: keys with dots run together", "models/snapshot.py", '.replace(".", "%2E")', "", SNAPSHOT),
    Mutant("snapshot: dtypes are cut without a word", "models/snapshot.py", "if array.dtype != node.dtype:", "if False:", SNAPSHOT),
    Mutant("snapshot: 64 bits are read as 32", "models/checkpoint.py", "if array.dtype != wanted[name].dtype]", "if array.shape != wanted[name].shape]", SNAPSHOT),
    Mutant("snapshot: any static field is written", "models/snapshot.py", "elif type(value) not in _PLAIN:", "elif False:", SNAPSHOT),
    Mutant("snapshot: what is unknown comes back as its description", "models/snapshot.py", '    raise SnapshotError(f"the snapshot holds {told!r}', '    return told\n    raise SnapshotError(f"the snapshot holds {told!r}', SNAPSHOT),
    Mutant("snapshot: loaded as a model", "models/load.py", 'if "snapshot" in raw:', "if False:", SNAPSHOT),
    Mutant("snapshot: empty arrays come back as scalars", "models/snapshot.py", "return jnp.zeros(shape, dtype)", "return jnp.zeros((), dtype)", SNAPSHOT),
    Mutant("gguf: only the end of a text ends an answer", "models/gguf.py", 'for end in ("eos", "eot", "eom")', 'for end in ("eos",)', "tests/models/test_gguf.py::test_an_answer_ends_with_a_text_a_turn_or_a_message"),
    Mutant("a call is not checked as a whole", "models/checks.py", "check_prompts(model, *given, max_new_tokens, whole, block_size, num_blocks, sampling)", "pass", "tests/models/test_lm.py::test_a_mesh_loses_no_check"),
    Mutant("options of batches are dropped", "models/lm.py", "all(options.get(name, value) == value for name, value in _BATCH_ONLY.items())", "options.get('num_beams', 1) < 2", "tests/models/test_lm.py::test_options_of_batches_are_never_dropped"),
    Mutant("greedy answers may be many", "models/beams.py", 'if num_return_sequences > 1 and not np.any(sampling.get("temperature", 0.0)):', "if False:", "tests/models/test_lm.py::test_options_of_batches_are_never_dropped"),
    Mutant("a stop string may be empty", "models/checks.py", 'or "" in stop_strings', "", "tests/models/test_lm.py::test_bad_input_is_refused"),
    Mutant("integers of any size", "models/arguments.py", "if not -end <= value < end:", "if False:", "tests/models/test_cli.py::test_integers_that_no_array_holds"),
    Mutant("ids of a file may be no integers", "models/cli.py", "all(type(token) is int for token in prompt)", "True", "tests/models/test_cli.py::test_prompts_of_a_file_are_texts_or_ids"),
    Mutant("the page map sees few steps", "models/cli.py", '"steps": 1}', '"steps": 8}', "tests/models/test_cli.py::test_the_page_map_of_short_answers"),
    Mutant("snapshot: files are not checked", "models/checkpoint.py", "    _verify(path)\n    return", "    return", SNAPSHOT),
)  # fmt: skip


def caught(mutant: Mutant) -> tuple[bool, str]:
    """Whether the mutant's tests fail on it, and pytest's last line."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for part in ("paxattn", "pallas_kernels", "models", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        (tree / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
        shutil.copy(ROOT / "pyproject.toml", tree)
        file = tree / mutant.file
        text = file.read_text()
        if mutant.old and text.count(mutant.old) != 1:
            return (
                False,
                f"{mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}, must stand once",
            )
        file.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests]
        try:
            result = subprocess.run(
                command,
                cwd=tree,
                capture_output=True,
                text=True,
                env={"JAX_COMPILATION_CACHE_DIR": str(CACHE), **os.environ, "PYTHONPATH": scratch},
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return True, f"did not end in {PATIENCE} s: a loop without an end is noticed too"
        lines = result.stdout.strip().splitlines()
        # 1 is "tests failed"; anything else (nothing collected, a crash of pytest) is not a catch.
        return result.returncode == 1, lines[-1] if lines else result.stderr[-200:]


def main() -> int:
    """Runs all mutants, one a core and two at least."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="mutants whose name holds this")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.name]
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        results = []
        for mutant, (ok, line) in zip(chosen, pool.map(caught, chosen), strict=True):
            results.append({"mutant": mutant.name, "file": mutant.file, "caught": ok, "pytest": line})
            if not options.json:
                print(f"{'caught  ' if ok else 'SURVIVED'}  {mutant.name:40} {line}", flush=True)
    survivors = sum(not r["caught"] for r in results)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print(f"{len(results) - survivors} of {len(results)} mutants caught")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main())
