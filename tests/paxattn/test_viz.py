"""The pictures say what the state says: every block once, every block taken and returned accounted for."""

import dataclasses
import functools
import re
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxattn as pax
from paxattn import viz
from paxattn.decoding import beam, speculative
from paxattn.decoding.eviction import Forgetful, SinksAndWindow, evicted
from paxattn.decoding.step import step
from paxattn.serving.loop import most, open_service, run
from paxattn.serving.queue import put
from paxattn.viz.picture import HUES
from paxattn.viz.recording import COUNTERS, Frame, Phase, between
from tests.toys import Chain, prompts

CHAIN = Chain(jnp.int32(3))


def table(num_blocks=12, block_size=4, max_num_seqs=3, max_model_len=24):
    return pax.PageTable.create(
        num_blocks=num_blocks, block_size=block_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )


def verbs():
    """A page table's life by hand, each verb a frame, and the table in the middle of it."""
    film = viz.Recording()
    t = film.see(table())
    t = film.see(pax.append(t, jnp.array([10, 5, 0]))[0])
    t = film.see(pax.fork(t, jnp.array([0, 1, 0])))
    middle = t = film.see(pax.append(t, jnp.array([1, 1, 1]))[0])
    t = film.see(pax.append(t, jnp.array([6, 0, 0]))[0])
    t = film.see(pax.truncate(t, jnp.array([12, 99, 99])))
    film.see(pax.free(t, jnp.ones(3, bool)))
    return film, middle


@jax.jit
def turn_evicting(service, window):
    """An iteration; one program for every window."""
    evict = pax.Eviction(SinksAndWindow(2, window))
    return run(CHAIN, service, budget=16, policy=pax.Policy(), steps=1, evict=evict)


@functools.cache
def served(window=99):
    """14 requests over 6 rows and a pool that is too small for them: admissions and preemptions."""
    rng = np.random.default_rng(0)
    ids, length = prompts(rng.integers(2, 20, 14).tolist())
    new = jnp.asarray(rng.integers(3, 40, 14), jnp.int32)
    service = open_service(CHAIN, lines=14, max_num_seqs=6, max_model_len=64, num_blocks=19, block_size=4)
    line = jnp.arange(14, dtype=jnp.int32)
    queue = put(service.queue, pax.Requests.create(ids, length, max_new_tokens=new), line, line, most(service))
    service = dataclasses.replace(service, queue=queue)
    film = viz.Recording()
    film.see(service)
    while bool(service.queue.unfinished.any()):
        service = film.see(turn_evicting(service, window))
    return film, service.stats, int(service.queue.preemptions.sum())


@functools.cache
def searched():
    """Beam search: forks and copies in nearly every step."""
    film = viz.Recording()
    search = film.see(beam.begin(CHAIN, *prompts((9, 21)), num_beams=3, max_new_tokens=12, block_size=4))
    search = film.see(jax.jit(lambda s: beam.branch(CHAIN, s, budget=32))(search))
    turn = jax.jit(lambda s: beam.advance(CHAIN, s, steps=1))
    while bool(search.rows.running.any()):
        search = film.see(turn(search))
    return film, search.rows.stats


@functools.cache
def whole():
    """One batch through every phase of the chapter's table: prefill, fork, decode, speculation, the end."""
    film, drafter = viz.Recording(), pax.NGram(1)
    new = jnp.array([26, 18])
    state = pax.start(CHAIN, *prompts((9, 21)), max_new_tokens=new, max_model_len=48, num_return_sequences=2,
                      block_size=4, temperature=3.0)  # fmt: skip
    state = film.see(state)
    state = film.see(jax.jit(lambda s: pax.fan_out(CHAIN, s, group=2, budget=32))(state))
    # A guess is made in every step, so that the tail shared by the samples is copied while verifying.
    state = speculative.begin(drafter, state, k=4)
    turn = jax.jit(lambda s: speculative.advance(CHAIN, drafter, s, k=4, budget=32, steps=1))
    while bool(state.running.any()):
        state = film.see(turn(state))
    return film, state.stats, state.tally


def served_evicting():
    """The same with rows that give blocks back while they live; still too small."""
    return served(6)


HOOK = pax.sinks_and_window(2, 1)
feed, evict = jax.jit(lambda s: step(Forgetful(CHAIN), s, budget=16)), jax.jit(lambda s: evicted(s, HOOK))


@functools.cache
def evicting(group=2):
    """Four rows, two samples of each of two prompts or four prompts, whose pages go as soon as they are full.

    Also how many blocks the hook gave back, by the run's own counter.
    """
    film, given, lengths = viz.Recording(), 0, (9, 21) if group == 2 else (9, 21, 13, 2)
    new = jnp.array([12, 8, 12, 8])[: len(lengths)]
    state = pax.start(CHAIN, *prompts(lengths), max_new_tokens=new, max_model_len=40, block_size=2,
                      num_return_sequences=group)  # fmt: skip
    film.see(state)
    if group > 1:  # a tail that they share is copied, and the copy full, in one step
        state = film.see(jax.jit(lambda s: pax.fan_out(CHAIN, s, group=group, budget=32))(state))
    while bool(state.running.any()):
        state = feed(state)
        before = int(state.stats.blocks_freed)
        state = film.see(evict(state))
        given += int(state.stats.blocks_freed) - before
    return film, state.stats, given


def evicting_prompts():
    """Prompts that are fed under eviction, in steps where others decode."""
    return evicting(1)


def with_holes(*lengths):
    """A table of blocks of two tokens whose rows keep two sinks and a window of four."""
    t, _, _ = pax.append(table(48, 2, len(lengths), 64), jnp.array(lengths))
    return pax.sinks_and_window(2, 4)(pax.Cache(t, ())).table


def hovers(svg):
    """The words under each block: {block: (who, refcount)}."""
    found = re.findall(r"<title>(\d+): (\S+), refcount (\d+)</title>", svg)
    assert len({block for block, _, _ in found}) == len(found), "a block is drawn once"
    return {int(block): (who, int(count)) for block, who, count in found}


# --- the page map ----------------------------------------------------------------------------------------


def test_every_block_is_drawn_once_with_its_holders_and_its_count():
    _, t = verbs()
    refcount = np.asarray(t.blocks.refcount)
    drawn = hovers(viz.page_map(t).svg())
    assert {block: count for block, (_, count) in drawn.items()} == {
        block: int(refcount[block]) for block in np.flatnonzero(refcount)
    }
    for block, (who, _) in drawn.items():
        holders = [row for row in range(3) if block in np.asarray(t.pages[row])]
        assert who == "..".join("ABC"[row] for row in sorted({holders[0], holders[-1]}))


def test_a_shared_block_has_two_colours():
    svg = viz.page_map(verbs()[1]).svg()
    (halves,) = re.findall(r'fill="([^"]+)" d="([^"]+)" pointer-events="none"', svg)
    assert halves == (HUES[2], "M83 24v19h-19zM103 24v19h-19z"), "rows A and C share blocks 1 and 2"


def test_the_text_version():
    _, t = verbs()
    assert str(viz.page_map(t)) == (
        "6 of 11 blocks of 4 tokens in use (a letter a row, * shared, . free)\n"
        "  |**CBBA.....|\n"
        "  row A:    11 tokens in 1 2 6\n"
        "  row B:     6 tokens in 4 5\n"
        "  row C:    11 tokens in 1 2 3"
    )
    assert repr(viz.page_map(t, width=6)).splitlines()[1:3] == ["  |**CBBA|", "  |.....|"]


def test_holes_are_drawn_as_holes():
    t = with_holes(18, 3, 23)
    assert str(viz.page_map(t)).splitlines()[-3:] == [
        "  row A: 6 of 18 tokens in 1 (6 evicted) 8 9",
        "  row B:     3 tokens in 10 11",
        "  row C: 5 of 23 tokens in 12 (9 evicted) 22 23",
    ]
    svg = viz.page_map(t).svg()
    assert re.findall(r'<g fill="[^"]+"><text [^>]+>(\d+)</text>', svg) == ["1", "8", "9", "10", "11", "12", "22", "23"]
    outlines = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"[^>]*fill="none"[^>]*><title>([^<]+)', svg)
    assert outlines == [("75.5", "177", "6 pages evicted"), ("75.5", "267", "9 pages evicted")]
    assert [float(width) for width in bars(svg, HUES[0])] == [30, 60]
    assert [float(width) for width in bars(svg, HUES[2])] == [30, 45]
    assert svg.count(">evicted<") == 1
    assert "evicted" not in viz.page_map(verbs()[1]).svg(), "where there are none the legend does not name them"


def test_holes_of_rows_too_long_to_name_their_blocks():
    svg = viz.page_map(with_holes(60, 9)).svg()
    assert [float(width) / 19 for width in bars(svg, HUES[0])] == [1, 2]
    assert "<title>27 pages evicted</title>" in svg
    assert "6 of 60 tokens" in svg


def bars(svg, fill):
    """Widths of what is filled of a row."""
    return re.findall(rf'width="([\d.]+)" height="17" fill="{fill}" pointer-events="none"', svg)


def test_a_notebook_shows_tables_and_caches_as_page_maps():
    _, t = verbs()
    assert t._repr_html_() == pax.Cache(t, ())._repr_html_() == viz.page_map(t).svg()
    assert jax.tree.map(lambda x: jnp.stack([x, x]), t)._repr_html_() is None  # of two shards


@pytest.mark.parametrize("forked", [False, True])
def test_ten_thousand_blocks_stay_under_a_megabyte(forked):
    """Every block in use, and all of them shared by two rows of different colours."""
    t, _, _ = pax.append(table(10_000, 16, 256, 16 * 78), jnp.where(jnp.arange(256) < 128, 16 * 78, 0))
    t = pax.fork(t, jnp.where(jnp.arange(256) < 128, jnp.arange(256), jnp.arange(256) - 128)) if forked else t
    svg = viz.page_map(t).svg()
    assert len(hovers(svg)) == int(t.blocks.num_used) == 9984
    assert len(svg.encode()) < 1_000_000


# --- what happened ---------------------------------------------------------------------------------------


def test_the_life_of_a_table_by_hand():
    moves = verbs()[0].moves
    assert [m.allocated for m in moves] == [5, 0, 1, 2, 0, 0]
    assert [m.freed for m in moves] == [0, 0, 0, 0, 2, 6]
    assert [m.fed for m in moves] == [15, 0, 3, 6, 0, 0]
    assert [m.joined.tolist() for m in moves][1] == [False, False, True]
    assert [m.shared_cells for m in moves] == [0, 3, 0, 0, 0, 0]
    assert moves[2].copied.tolist() == [True, False, False], "the last holder keeps the original"
    assert moves[4].rejected.tolist() == [5, 0, 0]
    assert moves[4].rolled_back == 2
    assert moves[5].ended.all()
    assert moves[3].phase.tolist() == [Phase.PREFILL, Phase.IDLE, Phase.IDLE]


def test_a_copy_is_no_page_of_a_prompt():
    """Row 0 is fed six tokens, the first into a tail that it shares; row 1 decodes."""
    t = pax.fork(pax.append(table(), jnp.array([10, 5, 0]))[0], jnp.array([0, 1, 0]))
    film = viz.Recording()
    film.see(pax.append(film.see(t), jnp.array([6, 1, 0]))[0])
    (move,) = film.moves
    assert (move.allocated, move.copies, move.prefilled) == (2, 1, 1)


@pytest.mark.parametrize("make", [served, served_evicting, evicting, evicting_prompts, searched, whole])
def test_frames_and_counters_agree(make):
    film, stats = make()[:2]
    for old, new, move in zip(film.frames, film.frames[1:], film.moves, strict=False):
        assert new.used == old.used + move.allocated - move.freed
    for name, counted in (("allocated", stats.blocks_allocated), ("freed", stats.blocks_freed),
                          ("copies", stats.blocks_copied), ("fed", stats.tokens_fed)):  # fmt: skip
        assert sum(getattr(m, name) for m in film.moves) == int(counted), name


@pytest.mark.parametrize("make", [verbs, served, served_evicting, evicting, evicting_prompts, searched, whole])
def test_what_the_phases_take_and_return_adds_up(make):
    film = make()[0]
    rows = viz.phases(film)
    assert sum(row.taken for row in rows) == sum(m.allocated for m in film.moves)
    assert sum(row.returned for row in rows) == sum(m.freed for m in film.moves)
    assert all(row.taken >= 0 <= row.returned for row in rows)


@pytest.mark.parametrize("make", [evicting, evicting_prompts])
def test_evicted_blocks_are_those_of_the_hook(make):
    film, stats, given = make()
    rows = {row.phase: row for row in viz.phases(film)}
    letting_go = sum(m.holes > 0 for m in film.moves)
    assert rows["Evict"].operation == f"{sum(m.holes for m in film.moves)} pages let go in {letting_go} steps"
    assert rows["Evict"].returned == given > 0
    assert rows["Free"].returned == int(stats.blocks_freed) - given
    assert "Fork" not in rows or rows["Fork"].returned == 0


@pytest.mark.parametrize("make", [served, served_evicting, evicting_prompts])
def test_prompts_take_the_pages_that_they_fill(make):
    """Whatever the blocks: a preempted request's until this step, evicted in it, or freed in it as the row ended."""
    film = make()[0]
    taken = 0
    for old, new, move in zip(film.frames, film.frames[1:], film.moves, strict=False):
        start = np.where(move.ended | (old.line == new.line), old.length, 0)
        end = np.where(move.ended, old.known, new.length)
        pages = -(-end // old.block_size) - -(-start // old.block_size)
        taken += pages[move.phase == Phase.PREFILL].sum()
    assert {row.phase: row for row in viz.phases(film)}["Prefill"].taken == taken > 0


@pytest.mark.parametrize("make", [served, served_evicting])
def test_rows_that_go_give_back_what_they_held(make):
    """One that ended: the pages of its text, less the holes. One that was preempted: its cells."""
    film = make()[0]
    ended = preempted = 0
    for old, move in zip(film.frames, film.moves, strict=False):
        ended += (-(-old.known // 4) - old.holes.sum(axis=1))[move.ended].sum()
        preempted += (old.pages[move.preempted] > 0).sum()
    rows = {row.phase: row for row in viz.phases(film)}
    assert (rows["Free"].returned, rows["Preempt"].returned) == (ended, preempted)
    assert ("Evict" in rows) == (make is served_evicting)


def test_a_block_may_change_hands_within_a_step():
    """Row 0 is fed four more tokens of its prompt, into the block of row 2, which is preempted; row 1 decodes."""

    def frame(pages, length, refcount, running, waiting, counted):
        arrays = np.array(pages), np.array(length), np.array(refcount), 4, np.array([12, 2, 3]), np.array(running)
        return Frame(*arrays, np.array([0, 1, 2]), frozenset(waiting), dict(zip(COUNTERS, counted, strict=True)), None)

    old = frame([[1, 0, 0], [2, 0, 0], [3, 0, 0]], [4, 1, 2], [0, 1, 1, 1], [True] * 3, (), (0, 0, 0, 0))
    new = frame([[1, 3, 0], [2, 0, 0], [0, 0, 0]], [8, 2, 0], [0, 1, 1, 1], [True, True, False], (2,), (5, 1, 1, 0))
    move = between(old, new)
    assert (move.allocated, move.prefilled, move.freed, move.dropped) == (1, 1, 1, 1)
    assert move.preempted.tolist() == [False, False, True]


def test_a_table_by_hand_evicts_too():
    film = viz.Recording()
    t = film.see(pax.append(table(48, 2, 2, 64), jnp.array([18, 0]))[0])
    t = film.see(pax.sinks_and_window(2, 4)(pax.Cache(t, ())).table)
    t = film.see(pax.fork(t, jnp.array([0, 0])))
    film.see(pax.free(t, jnp.ones(2, bool)))
    assert [(m.holes, m.evicted, m.freed) for m in film.moves] == [(6, 6, 6), (0, 0, 0), (0, 0, 3)]
    assert [(row.phase, row.returned) for row in viz.phases(film)] == [("Fork", 0), ("Evict", 6), ("Free", 3)]


@pytest.mark.parametrize("make", [served, served_evicting])
def test_preemptions_are_those_of_the_queue(make):
    film, _, preemptions = make()
    assert sum(int(m.preempted.sum()) for m in film.moves) == preemptions > 0
    assert sum(int(m.ended.sum()) for m in film.moves) == 14
    assert "Preempt" in [row.phase for row in viz.phases(film)]


def test_copies_of_a_search_are_those_of_its_rows():
    film, stats = searched()
    assert sum(int(m.copied.sum()) for m in film.moves) > 0
    assert sum(m.copies for m in film.moves) == int(stats.blocks_copied)
    rows = {row.phase: row for row in viz.phases(film)}
    assert rows["Fork"].taken == int(stats.blocks_copied)
    assert rows["Fork"].returned > 0, "beams that died gave their blocks back"


def test_the_whole_flow_has_the_phases_of_the_chapter():
    film, stats, tally = whole()
    rows = {row.phase: row for row in viz.phases(film)}
    assert list(rows) == ["Prefill", "Fork", "Speculative", "Free"]
    assert rows["Prefill"].operation == "30 tokens fed in 1 step"
    assert rows["Fork"].operation == "2 rows forked, 2 copied on write"
    assert int(stats.blocks_copied) == 2, "copies while verifying count, too"
    assert rows["Speculative"].returned == int(tally.blocks_rolled_back.sum())
    assert sum(int(m.rejected.sum()) for m in film.moves) == int((tally.drafted - tally.accepted).sum()) > 0


# --- how it is drawn -------------------------------------------------------------------------------------


def pictures():
    _, middle = verbs()
    films = [make()[0] for make in (verbs, served, served_evicting, evicting, evicting_prompts, searched, whole)]
    maps = [viz.page_map(t) for t in (middle, table(), with_holes(18, 3, 23), with_holes(60, 9))]
    return [*maps, *map(viz.timeline, films), *map(viz.flow, films)]


def test_pictures_are_well_formed_and_self_contained(tmp_path):
    for picture in pictures():
        picture.save(tmp_path / "picture.svg")
        for svg in (picture._repr_html_(), (tmp_path / "picture.svg").read_text("utf-8")):
            root = ET.fromstring(svg)
            assert "script" not in svg
            assert svg.count("http") == 1, "the name of SVG and no address"
            assert root.get("aria-label") == picture.title
            for element in root.iter():
                x, width = float(element.get("x", 0)), float(element.get("width", "0"))
                assert 0 <= x <= x + (width if element is not root else 0) <= picture.width
                assert 0 <= float(element.get("y", 0)) <= picture.height
        assert "prefers-color-scheme" in svg, "a file follows the reader's theme"
        assert "#000" not in svg, "ink is the page's own"


def test_a_timeline_in_characters():
    assert str(viz.timeline(verbs()[0])) == (
        "6 steps, at most 8 of 11 blocks in use after a step\n"
        "  blocks |▄▄▅▆▅ |\n"
        "  row A  |p.CpR||\n"
        "  row B  |p.d..||\n"
        "  row C  |.Fd..||\n"
        "  p prompt, d decode, F forked, C copied on write, R rolled back, | ended"
    )


def test_a_timeline_needs_two_frames():
    film = viz.Recording()
    film.see(table())
    with pytest.raises(ValueError, match="1 frames; see at least two"):
        viz.timeline(film)
