from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmserve.engine.block_pool import BlockPool, IntegrityError, hash_block


def hash_of(number: int) -> bytes:
    return hash_block(b"", [number])


def fill(pool: BlockPool, count: int, first_hash: int = 0) -> list[int]:
    """A table of cached blocks."""
    table = pool.allocate(count)
    assert table is not None
    for i, block in enumerate(table):
        pool.set_contents(block, hash_of(first_hash + i))
    return table


def test_hash_depends_on_every_token_and_on_all_before() -> None:
    names = {hash_block(parent, ids) for parent in (b"", b"x") for ids in ([1, 2], [2, 1], [1, 3], [1, 2, 0])}
    assert len(names) == 8
    assert hash_block(b"", [1, 2]) == hash_block(b"", [1, 2])


def test_too_few_blocks_changes_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_allocation_follows_its_neighbour_while_it_can() -> None:
    pool = BlockPool(10)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(1, after=5) == [6]
    assert pool.allocate(3, after=4) == [5, 2, 3], "6 is taken"
    assert pool.allocate(1, after=9) == [4], "there is nothing behind the last block"


def test_blocks_come_out_ascending() -> None:
    pool = BlockPool(6)
    table = pool.allocate(6)
    assert table is not None
    for block in (4, 0, 5, 2):
        pool.release([block])
    assert pool.allocate(4) == [0, 2, 4, 5]


def test_uncached_blocks_go_first_then_the_least_recently_freed() -> None:
    pool = BlockPool(6)
    old, new = fill(pool, 2), fill(pool, 2, first_hash=2)
    plain = pool.allocate(2)
    assert plain is not None
    for table in (old, new, plain):
        pool.release(table)
    assert pool.allocate(2) == plain
    assert pool.allocate(1) == old[1:], "the leaf goes before the root"
    assert pool.find(hash_of(0)) == old[0]
    assert pool.allocate(1) == old[:1]
    assert [pool.find(hash_of(i)) for i in range(4)] == [None, None, *new]


def test_adjacency_does_not_cost_cached_contents() -> None:
    pool = BlockPool(4)
    table = fill(pool, 2)
    pool.release(table[1:])
    assert pool.allocate(1, after=table[0]) == [2]
    assert pool.find(hash_of(1)) == table[1]


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(2)
    table = fill(pool, 1)
    pool.share(table)
    pool.release(table)
    assert not pool.is_free(table[0])
    pool.release(table)
    assert pool.is_free(table[0])
    pool.share(table)
    assert pool.num_free == 1
    assert pool.allocate(2) is None
    pool.check_integrity([table])


def test_of_two_equal_blocks_the_first_is_found() -> None:
    pool = BlockPool(2)
    first, second = fill(pool, 1), fill(pool, 1)
    assert pool.find(hash_of(0)) == first[0]
    pool.release(second)
    pool.release(first)
    assert pool.allocate(1) == second, "it is not cached"
    pool.check_integrity([second])


def test_double_release_raises() -> None:
    pool = BlockPool(2)
    table = pool.allocate(1)
    assert table is not None
    pool.release(table)
    with pytest.raises(IntegrityError, match="nobody holds it"):
        pool.release(table)


def test_integrity_check_sees_what_is_wrong() -> None:
    pool = BlockPool(3)
    table = pool.allocate(2)
    assert table is not None
    pool.check_integrity([table])
    for tables in ([], [table, table[:1]], [[0, 2]]):
        with pytest.raises(IntegrityError, match="reference counts"):
            pool.check_integrity(tables)


def test_integrity_check_sees_contents_under_a_wrong_name() -> None:
    pool = BlockPool(2)
    table = fill(pool, 2)
    pool._hash_of[table[0]] = hash_of(1)
    with pytest.raises(IntegrityError, match="not its own"):
        pool.check_integrity([table])
    pool._hash_of[table[0]] = None
    with pytest.raises(IntegrityError, match="not its own"):
        pool.check_integrity([table])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_any_use_keeps_the_books(num_blocks: int, operations: list[tuple[int, int]]) -> None:
    """Against the obvious model: which tables are held, and what each block was last filled with."""
    pool = BlockPool(num_blocks)
    tables: list[list[int]] = []
    contents: dict[int, int] = {}
    for operation, number in operations:
        held = {block for table in tables for block in table}
        if operation == 0:
            after = tables[-1][-1] if tables and tables[-1] else None
            new = pool.allocate(number % 5, after=after)
            assert (new is None) == (number % 5 > num_blocks - len(held))
            if new is not None:
                assert held.isdisjoint(new)
                assert len(set(new)) == len(new) == number % 5
                tables.append(new)
                for block in new:
                    contents.pop(block, None)
        elif operation == 1 and tables:
            pool.release(tables.pop(number % len(tables)))
        elif operation == 2 and tables:
            for block in tables[number % len(tables)]:
                if block not in contents:
                    pool.set_contents(block, hash_of(number))
                    contents[block] = number
        elif operation == 3:
            found = pool.find(hash_of(number))
            if found is not None:
                assert contents[found] == number
                pool.share([found])
                tables.append([found])
        pool.check_integrity(tables)
        assert pool.num_free == num_blocks - len({block for table in tables for block in table})
