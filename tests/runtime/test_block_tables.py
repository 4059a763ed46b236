"""The device knows of every table what a step needs, and is told each entry once."""

from __future__ import annotations

import numpy as np
import torch

from lmserve.runtime.block_tables import BlockTables

SCRATCH = 99
CPU = torch.device("cpu")


def learn(tables: BlockTables, rows: dict[int, list[int]], counts: dict[int, int]) -> list[tuple[int, int]]:
    """Tells and writes; the entries that the step itself has to write."""
    slots = list(rows)
    needed = np.array([counts[slot] for slot in slots], np.int64)
    places, blocks = tables.learn(np.array(slots, np.int64), needed, list(rows.values()))
    tables.write(torch.from_numpy(places), torch.from_numpy(blocks))
    return list(zip(places.tolist(), blocks.tolist(), strict=True))


def test_a_table_is_sent_once_and_then_grows_by_entries() -> None:
    tables = BlockTables(3, 5, SCRATCH, CPU)
    mine = {2: [7, 8, 9]}
    assert learn(tables, mine, {2: 3}) == [(2 * 5 + 2, 9)], "the last is the step's, those before are there already"
    assert tables.blocks[2].tolist() == [7, 8, 9, SCRATCH, SCRATCH]
    assert learn(tables, mine, {2: 3}) == [tables.no_entry]
    mine[2].append(4)
    assert learn(tables, mine, {2: 3}) == [tables.no_entry], "not needed yet"
    assert learn(tables, mine, {2: 4}) == [(2 * 5 + 3, 4)]
    assert tables.blocks[2].tolist() == [7, 8, 9, 4, SCRATCH]


def test_rows_are_told_apart_and_others_are_left_as_they_are() -> None:
    tables = BlockTables(4, 3, SCRATCH, CPU)
    learn(tables, {3: [30, 31], 0: [1]}, {3: 2, 0: 1})
    entries = learn(tables, {0: [1, 2, 3], 1: [10], 3: [30, 31]}, {0: 3, 1: 1, 3: 2})
    assert entries == [(2, 3), (3, 10), tables.no_entry]
    assert tables.blocks.tolist() == [
        [1, 2, 3],
        [10, SCRATCH, SCRATCH],
        [SCRATCH] * 3,
        [30, 31, SCRATCH],
        [SCRATCH] * 3,
    ]


def test_a_new_owner_begins_anew() -> None:
    tables = BlockTables(2, 3, SCRATCH, CPU)
    learn(tables, {1: [5, 6]}, {1: 2})
    tables.forget(1)
    learn(tables, {1: [8]}, {1: 1})
    assert tables.blocks[1].tolist()[0] == 8
    assert learn(tables, {1: [8, 9]}, {1: 2}) == [(4, 9)]
    assert tables.blocks[1].tolist() == [8, 9, SCRATCH]


def test_padding_has_the_scratch_block_only() -> None:
    tables = BlockTables(2, 3, SCRATCH, CPU)
    learn(tables, {0: [1, 2], 1: [3, 4]}, {0: 1, 1: 2})
    learn(tables, {0: [1, 2], 1: [3, 4]}, {0: 1, 1: 2})
    assert tables.blocks[tables.padding].tolist() == [SCRATCH] * 3


def test_entries_are_looked_up_by_row() -> None:
    tables = BlockTables(2, 3, SCRATCH, CPU)
    learn(tables, {0: [1, 2], 1: [3, 4, 5]}, {0: 2, 1: 3})
    found = tables.look_up(torch.tensor([1, 0, 2, 1]), torch.tensor([2, 1, 0, 0]))
    assert (found.tolist(), found.dtype) == ([5, 2, SCRATCH, 3], torch.int64)
